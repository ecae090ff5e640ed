"""The gradient is that of the global batch, however many real processes share it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from detr.batch import Target, collate, normalise
from detr.matcher import generalized_iou, match
from detr.model import Outputs, build_model
from pipeline.config import RunConfig
from pipeline.distributed.parallel import Strategy, distribute, unwrap
from pipeline.distributed.ranks import Ranks
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.requests import NO_REQUEST, Request
from pipeline.training.step import train_step
from shards.config import PlanConfig
from shards.dataset.manifest import Manifest
from shards.plan.epoch import plan_epoch
from tests.support.ranks import on_two_nodes, run_ranks
from tests.support.step_samples import CONFIG, MODEL, UNEVEN, samples

EVEN = (2,) * 8
SHORT = (1, 2, 0, 3, 1, 0, 4, 2, 1, 1, 0, 5, 2)
FEW = (0, 0, 0, 1, 0, 0, 0, 0)  # fewer boxes than ranks

# The same with a mask head, which needs 128 channels and 8 heads; and with that head alone being trained.
MASKS = replace(CONFIG, model=replace(MODEL, masks=True, hidden_dim=128, heads=8))
HEAD = replace(MASKS, optim=replace(MASKS.optim, train="mask_head"))


def gradients(
    ranks: Ranks,
    shares: list[tuple[int, ...]],
    boxes: tuple[int, ...],
    config: RunConfig = CONFIG,
    passes: int = 1,
    strategy: Strategy = "ddp",
) -> tuple[dict[str, Tensor], float]:
    """Return every parameter's gradient after a step in which rank r has the images `shares[r]`, and the total loss.

    `passes` is the number of micro-batches of a rank.
    """
    torch.manual_seed(0)
    model = build_trainable_model(config, 4)
    wrapped = distribute(model, on_two_nodes(ranks), strategy)
    optimizer = build_optimizer(unwrap(wrapped), config.optim)
    made, mine = samples(boxes), shares[ranks.rank]
    cuts = [len(mine) * number // passes for number in range(passes + 1)]
    batches = [collate([made[i] for i in mine[start:stop]]) for start, stop in pairwise(cuts)]
    result = train_step(wrapped, batches, optimizer, config, ranks, step=0)
    parameters = unwrap(wrapped).named_parameters()
    found = {name: whole_tensor(p.grad).clone() for name, p in parameters if p.grad is not None}
    return found, float(ranks.sum(result.losses.total.detach()) / ranks.world_size)


def whole_tensor(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def evenly(world_size: int) -> list[tuple[int, ...]]:
    each = 8 // world_size
    return [tuple(range(rank * each, (rank + 1) * each)) for rank in range(world_size)]


def assert_equal(
    found: tuple[dict[str, Tensor], float], expected: tuple[dict[str, Tensor], float], atol: float = 1e-5
) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=atol, msg=name)
    assert found[1] == pytest.approx(expected[1], abs=atol)


CASES = (EVEN, UNEVEN, FEW)


def all_gradients(ranks: Ranks, shares: list[tuple[int, ...]]) -> list[tuple[dict[str, Tensor], float]]:
    return [gradients(ranks, shares, boxes) for boxes in CASES]


def gradients_with_masks(ranks: Ranks, shares: list[tuple[int, ...]]) -> list[tuple[dict[str, Tensor], float]]:
    return [gradients(ranks, shares, boxes, config) for config in (MASKS, HEAD) for boxes in CASES]


@pytest.fixture(scope="module")
def alone() -> list[tuple[dict[str, Tensor], float]]:
    """Return the gradients of one process with all eight images."""
    return all_gradients(Ranks(), evenly(1))


@pytest.mark.parametrize(
    "shares",
    [evenly(2), evenly(4), [(0, 1, 2), (), (3, 4, 5, 6, 7)]],
    ids=["2x4", "4x2", "3, one of them without images"],
)
def test_the_gradient_of_several_ranks_is_that_of_one(
    shares: list[tuple[int, ...]], alone: list[tuple[dict[str, Tensor], float]]
) -> None:
    for found_by_rank in run_ranks(len(shares), all_gradients, shares):
        for found, expected in zip(found_by_rank, alone, strict=True):
            assert_equal(found, expected)


def accumulated_gradients(
    ranks: Ranks, shares: list[tuple[int, ...]], passes: int, strategy: Strategy
) -> list[tuple[dict[str, Tensor], float]]:
    return [gradients(ranks, shares, boxes, passes=passes, strategy=strategy) for boxes in CASES]


@pytest.mark.parametrize(
    ("shares", "passes", "strategy"),
    [
        (evenly(1), 4, "ddp"),
        (evenly(2), 2, "ddp"),
        (evenly(2), 2, "fsdp"),
        ([(0, 1, 2, 3, 4, 5), (6,), (7,)], 3, "fsdp"),
        ([(0, 1, 2, 3), (4, 5), (6,), (7,)], 2, "hsdp"),
    ],
    ids=[
        "1x(4x2)",
        "2x(2x2)",
        "2x(2x2), fsdp",
        "3x3, fsdp, some passes without images",
        "2 nodes x2x2, hsdp, some passes without images",
    ],
)
def test_the_gradient_of_micro_batches_is_that_of_one_pass(
    shares: list[tuple[int, ...]], passes: int, strategy: Strategy, alone: list[tuple[dict[str, Tensor], float]]
) -> None:
    for found_by_rank in run_ranks(len(shares), accumulated_gradients, shares, passes, strategy):
        for found, expected in zip(found_by_rank, alone, strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize("shares", [evenly(2), [(0, 1, 2), (), (3, 4, 5, 6, 7)]], ids=["2x4", "3, one without images"])
def test_the_gradient_of_a_mask_head_is_that_of_one_rank_too(shares: list[tuple[int, ...]]) -> None:
    """With and without the detector's gradients; ranks without a box have a mask head without a mask."""
    expected = gradients_with_masks(Ranks(), evenly(1))
    for found, _ in expected[len(CASES) :]:
        assert {name.split(".")[0] for name in found} == {"bbox_attention", "mask_head"}
        assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-3
    for found_by_rank in run_ranks(len(shares), gradients_with_masks, shares):
        for found, expected_of_case in zip(found_by_rank, expected, strict=True):
            assert_equal(found, expected_of_case, atol=1e-4)  # of gradients up to 150


def test_a_short_step_at_the_end_of_an_epoch_has_the_gradient_of_one_rank() -> None:
    """Of 13 images the second step of eight has five, so two of seven ranks have none."""
    world_size = 7
    manifest = cast(Manifest, SimpleNamespace(images=len(SHORT)))
    plan = plan_epoch(manifest, seed=0, epoch=0, batch_size=8, config=PlanConfig(epoch_tail="short"))
    whole = [tuple(plan.step(1)[0].tolist())]
    shares = [tuple(plan.step(1, rank, world_size)[0].tolist()) for rank in range(world_size)]
    assert sorted(map(len, shares)) == [0, 0, 1, 1, 1, 1, 1]
    expected = gradients(Ranks(), whole, SHORT)
    for found in run_ranks(world_size, gradients, shares, SHORT):
        assert_equal(found, expected)


def test_the_gradients_that_are_compared_are_not_all_but_zero(alone: list[tuple[dict[str, Tensor], float]]) -> None:
    for found, _ in alone:
        assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-2


def per_rank(config: RunConfig) -> RunConfig:
    return replace(config, optim=replace(config.optim, normalise="per_rank"))


def gradients_per_rank(
    ranks: Ranks, shares: list[tuple[int, ...]], passes: int
) -> list[tuple[dict[str, Tensor], float]]:
    return [gradients(ranks, shares, boxes, per_rank(CONFIG), passes) for boxes in CASES]


def originals(shares: list[tuple[int, ...]], boxes: tuple[int, ...]) -> tuple[dict[str, Tensor], float]:
    """Return the gradient of the original with one GPU per share: `SetCriterion`'s formulas, and DDP's mean of gradients."""
    made = samples(boxes)
    num_boxes = max(sum(boxes) / len(shares), 1.0)
    found: dict[str, Tensor] = {}
    total = 0.0
    for share in shares:
        torch.manual_seed(0)
        model = build_trainable_model(CONFIG, 4).train()
        batch = collate([made[i] for i in share])
        outputs = model(normalise(batch, CONFIG.transform), batch.padding)
        loss = torch.zeros(())
        for layer in (outputs, *outputs.auxiliary):
            loss = loss + original_losses(layer, batch.targets, num_boxes)
        loss.backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[name] = found.get(name, torch.zeros_like(parameter)) + parameter.grad / len(shares)
        total += float(loss.detach()) / len(shares)
    return found, total


def original_losses(layer: Outputs, targets: Sequence[Target], num_boxes: float) -> Tensor:
    """Return loss_labels and loss_boxes of the original's `models/detr.py`, weighted."""
    pairs = match(layer, targets, CONFIG.loss)
    classes = torch.full(layer.logits.shape[:2], 4)
    for image, ((queries, objects), target) in enumerate(zip(pairs, targets, strict=True)):
        classes[image, queries] = target.labels[objects]
    empty_weight = torch.ones(5)
    empty_weight[-1] = CONFIG.loss.eos_coef
    loss = nn.functional.cross_entropy(layer.logits.transpose(1, 2), classes, empty_weight)
    source = torch.cat([layer.boxes[image, queries] for image, (queries, _) in enumerate(pairs)])
    truth = torch.cat([target.boxes[objects] for (_, objects), target in zip(pairs, targets, strict=True)])
    l1 = (source - truth).abs().sum() / num_boxes
    giou = (1 - generalized_iou(source, truth)).sum() / num_boxes
    return loss + CONFIG.loss.weight_bbox * l1 + CONFIG.loss.weight_giou * giou


@pytest.mark.parametrize(
    ("shares", "passes"),
    [(evenly(2), 1), ([(0, 1, 2, 3, 4), (5, 6, 7)], 1), (evenly(2), 2)],
    ids=["2x4", "5 and 3", "2x(2x2), as on four GPUs"],
)
def test_per_rank_normalisation_gives_the_gradient_of_the_original(
    shares: list[tuple[int, ...]], passes: int, alone: list[tuple[dict[str, Tensor], float]]
) -> None:
    parts = [
        share[len(share) * n // passes : len(share) * (n + 1) // passes] for share in shares for n in range(passes)
    ]
    expected = [originals(parts, boxes) for boxes in CASES]
    for found_by_rank in run_ranks(len(shares), gradients_per_rank, shares, passes):
        for found, expected_of_case in zip(found_by_rank, expected, strict=True):
            assert_equal(found, expected_of_case)
    # Where ranks differ in what they hold, so do the two ways: else nothing is tested here.
    for per_rank_sums, global_sums in list(zip(expected, alone, strict=True))[1:]:
        assert abs(per_rank_sums[1] - global_sums[1]) > 1e-2


def failing_step(ranks: Ranks, where: str, strategy: Strategy) -> tuple[str, bool]:
    """Run a step in which one rank's images are at fault; return the error, and if the weights are as before."""
    torch.manual_seed(0)
    model = build_model(MODEL, 4)
    wrapped = distribute(model, on_two_nodes(ranks), strategy)
    optimizer = build_optimizer(unwrap(wrapped), CONFIG.optim)
    made = samples(EVEN)[4 * ranks.rank : 4 * ranks.rank + 4]
    batch = collate(made)
    before = {name: whole_tensor(value).clone() for name, value in unwrap(wrapped).state_dict().items()}
    config = CONFIG
    if ranks.rank == 1 and where == "sum":
        # The loss overflows in the sum, not in a prediction, so no rank sees it before the backward.
        config = replace(CONFIG, loss=replace(CONFIG.loss, weight_giou=3e38))
    if ranks.rank == 1 and where == "matcher":
        batch.targets[2].boxes[1, 3] = torch.nan
    message = ""
    try:
        train_step(wrapped, [batch], optimizer, config, ranks, step=7)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    after = {name: whole_tensor(value) for name, value in unwrap(wrapped).state_dict().items()}
    return message, all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("sum", "the gradient is not finite though every loss is; images [0, 1, 2, 3, 4, 5, 6, 7]"),
        ("matcher", "rank 1: matching: got non-finite values in the target boxes of images 6,"),
    ],
)
def test_a_value_that_is_not_finite_on_one_rank_stops_every_rank(where: str, reason: str, strategy: Strategy) -> None:
    for message, unchanged in run_ranks(2, failing_step, where, strategy):
        assert message.startswith("Diverged: step 7")
        assert reason in message
        assert unchanged


def stopping_step(ranks: Ranks) -> list[bool]:
    """Return if this rank must stop after a step without requests, and after one in which rank 1 alone makes one."""
    wrapped = distribute(build_trainable_model(CONFIG, 4), ranks)
    optimizer = build_optimizer(unwrap(wrapped), CONFIG.optim)
    batch = collate(samples(EVEN)[:2])
    requests = (NO_REQUEST, Request(stop=ranks.rank == 1))
    return [
        train_step(wrapped, [batch], optimizer, CONFIG, ranks, step, ask).request.stop
        for step, ask in enumerate(requests)
    ]


def test_a_request_of_one_rank_reaches_all_ranks() -> None:
    assert run_ranks(2, stopping_step) == [[False, True]] * 2


FROZEN = replace(CONFIG, optim=replace(CONFIG.optim, lr_backbone=0.0))


def steps_with_a_frozen_backbone(ranks: Ranks, strategy: Strategy) -> tuple[list[float], bool]:
    """Return the losses of three steps, and whether the backbone is as before."""
    torch.manual_seed(0)
    wrapped = distribute(build_trainable_model(FROZEN, 4), ranks, strategy)
    optimizer = build_optimizer(unwrap(wrapped), FROZEN.optim)

    def backbone() -> list[Tensor]:
        named = unwrap(wrapped).named_parameters()
        return [whole_tensor(value.detach()).clone() for name, value in named if "backbone" in name]

    before, share = backbone(), 8 // ranks.world_size
    batch = collate(samples(UNEVEN)[ranks.rank * share : (ranks.rank + 1) * share])
    losses = [train_step(wrapped, [batch], optimizer, FROZEN, ranks, step).losses.total for step in range(3)]
    means = [float(ranks.sum(loss.detach().clone())) / ranks.world_size for loss in losses]
    return means, all(map(torch.equal, before, backbone()))


def test_a_frozen_backbone_trains_the_rest_on_two_ranks_as_on_one() -> None:
    expected, unchanged = steps_with_a_frozen_backbone(Ranks(), "single")
    assert unchanged
    assert expected[-1] < expected[0]
    for strategy in ("ddp", "fsdp"):
        for found in run_ranks(2, steps_with_a_frozen_backbone, strategy):
            assert found == (pytest.approx(expected, rel=1e-5), True)
