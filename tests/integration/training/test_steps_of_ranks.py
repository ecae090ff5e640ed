"""Steps that several ranks take together: values that are not finite, requests, and a frozen backbone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detr.batch import collate
from detr.model import build_model
from pipeline.distributed.parallel import Strategy, distribute, unwrap
from pipeline.distributed.ranks import Ranks
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.requests import NO_REQUEST, Request
from pipeline.training.step import train_step
from tests.support.rank_gradients import EVEN, whole_tensor
from tests.support.ranks import on_two_nodes, run_ranks
from tests.support.step_samples import CONFIG, MODEL, UNEVEN, samples


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
