import warnings
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from detr.batch import Batch, Target, collate
from detr.model import DETR, Outputs, build_model
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import TrainingError
from pipeline.training.optim import build_optimizer
from pipeline.training.step import normalisers, train_step


def target(image_id: int, boxes: int) -> Target:
    return Target(
        torch.full((boxes, 4), 0.25) + 0.01 * torch.arange(boxes)[:, None],
        torch.arange(boxes) % 4,
        image_id,
        (64, 64),
    )


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    return collate([(images[0], target(31, 2)), (images[1], target(57, 0))])


@pytest.fixture
def model(tiny_config: RunConfig) -> DETR:
    torch.manual_seed(0)
    return build_model(tiny_config.model, 4).train()


def step(model: nn.Module, batch: Batch, config: RunConfig, number: int = 3) -> float:
    optimizer = build_optimizer(model, config.optim)
    return float(train_step(model, [batch], optimizer, config, Ranks(), number).losses.total.detach())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_weights_that_are_not_finite_stop_before_the_update(model: DETR, batch: Batch, tiny_config: RunConfig) -> None:
    with torch.no_grad():
        model.class_embed.bias[0] = float("nan")
    before = weights(model)
    with pytest.raises(TrainingError, match=r"step 12: .*rank 0: .*31.*lower --optim\.lr") as caught:
        step(model, batch, tiny_config, 12)
    assert "\n" not in str(caught.value)
    after = weights(model)
    assert all(torch.equal(after[name], value) or torch.isnan(value).any() for name, value in before.items())


def test_a_loss_that_is_not_finite_leaves_the_weights(
    model: DETR, batch: Batch, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.training import step as module

    compute = module.compute_losses

    def broken(*arguments: object, **more: object) -> object:
        losses = compute(*arguments, **more)  # type: ignore[arg-type]
        return losses._replace(
            total=losses.total * torch.inf, parts=losses.parts | {"loss_giou": torch.tensor(torch.inf)}
        )

    monkeypatch.setattr(module, "compute_losses", broken)
    before = weights(model)
    with pytest.raises(
        TrainingError, match=r"step 12: not finite before the update: rank 0: loss_giou on images \[31, 57\]"
    ):
        step(model, batch, tiny_config, 12)
    assert all(torch.equal(after, before[name]) for name, after in weights(model).items())


class Broken(nn.Module):
    """A model whose predictions for some images are no numbers: (part, layer, row of the batch)."""

    def __init__(self, model: DETR, faults: Sequence[tuple[str, int, int]]) -> None:
        super().__init__()
        self.model, self.faults = model, faults

    def forward(self, images: torch.Tensor, padding: torch.Tensor | None) -> Outputs:
        outputs = self.model(images, padding)
        layers = [outputs._replace(auxiliary=()), *outputs.auxiliary]
        for part, layer, row in self.faults:
            broken = getattr(layers[layer], part).clone()
            broken[row, 3, 1] = torch.nan
            layers[layer] = layers[layer]._replace(**{part: broken})
        return layers[0]._replace(auxiliary=tuple(layers[1:]))


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([("logits", 0, 0)], "in the logits of images 31, expected"),
        ([("boxes", 1, 1)], "in the boxes of images 57, expected"),
        ([("logits", 0, 0), ("boxes", 0, 1)], "in the logits of images 31 and boxes of images 57, expected"),
        ([("logits", 1, 2)], "loss_ce_0 on images [90]"),
        ([("target boxes", 0, 1)], "in the target boxes of images 57, expected"),
    ],
    ids=["logits", "boxes of an auxiliary layer", "both", "an image without objects", "target boxes"],
)
def test_the_error_names_step_loss_and_images(
    model: DETR, tiny_config: RunConfig, faults: list[tuple[str, int, int]], message: str
) -> None:
    torch.manual_seed(1)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    targets = [target(31, 2), target(57, 1), target(90, 0)]
    predicted = [fault for fault in faults if fault[0] != "target boxes"]
    for _, _, row in set(faults) - set(predicted):
        targets[row].boxes[0, 2] = torch.nan
    before = weights(model)
    with pytest.raises(TrainingError) as caught:
        step(Broken(model, predicted), collate(list(zip(images, targets, strict=True))), tiny_config, 12)
    assert "step 12" in str(caught.value)
    assert "rank 0" in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(after, before[name]) for name, after in weights(model).items())


def test_dropout_depends_only_on_the_step(model: DETR, batch: Batch, tiny_config: RunConfig) -> None:
    start = weights(model)

    def loss(number: int, before: int) -> float:
        model.load_state_dict(start)
        torch.manual_seed(before)
        return step(model, batch, tiny_config, number)

    assert loss(3, before=1) == loss(3, before=2)
    assert loss(3, before=1) != loss(4, before=1)


def test_the_gradient_is_clipped_and_its_norm_returned(model: DETR, batch: Batch, tiny_config: RunConfig) -> None:
    optimizer = build_optimizer(model, tiny_config.optim)
    result = train_step(model, [batch], optimizer, tiny_config, Ranks(), 0)
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(norm) == pytest.approx(tiny_config.optim.clip_norm, rel=1e-3)
    assert result.grad_norm > norm


def test_losses_are_divided_by_sums_of_the_whole_batch(batch: Batch, tiny_config: RunConfig) -> None:
    # 8 queries in each of 2 images; 2 matched weigh 1, 14 weigh 0.1.
    [(boxes, weight, _)], asking = normalisers([batch], tiny_config, Ranks())
    assert (float(boxes), float(weight), asking.tolist()) == (2.0, pytest.approx(3.4), [0, 0])


def test_a_batch_without_any_box_divides_by_one(tiny_config: RunConfig, model: DETR) -> None:
    empty = collate([(torch.zeros(3, 64, 64, dtype=torch.uint8), target(5, 0))])
    [(boxes, weight, copies)], _ = normalisers([empty], tiny_config, Ranks())
    assert (float(boxes), float(weight), float(copies)) == (1.0, pytest.approx(0.8), 1.0)
    assert step(model, empty, tiny_config) > 0


def test_no_boxes_and_eos_coef_0_give_no_gradient(tiny_config: RunConfig, model: DETR) -> None:
    config = replace(tiny_config, loss=replace(tiny_config.loss, eos_coef=0.0))
    empty = collate([(torch.zeros(3, 64, 64, dtype=torch.uint8), target(5, 0))])
    assert step(model, empty, config) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_step_waits_for_the_device_at_most_twice(model: DETR, batch: Batch, tiny_config: RunConfig) -> None:
    """The matcher's costs and the check of the gradient each wait once."""
    optimizer = build_optimizer(model.cuda(), tiny_config.optim)
    ranks = Ranks(device=torch.device("cuda"))
    train_step(model, [batch], optimizer, tiny_config, ranks, 0)  # what is made once may wait
    try:
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_step(model, [batch], optimizer, tiny_config, ranks, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
    assert len(waits) <= 2, waits
