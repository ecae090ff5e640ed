import pytest
import torch
from torch.nn import functional as F

from detr.batch import Target
from detr.config import LossConfig
from detr.criterion import ce_weight_sum, compute_losses
from detr.matcher import match
from detr.model import Outputs


def drawn(counts: list[int], layers: int = 3, queries: int = 8, classes: int = 5) -> tuple[Outputs, list[Target]]:
    torch.manual_seed(0)

    def layer() -> Outputs:
        boxes = torch.rand(len(counts), queries, 4) * 0.5 + 0.2
        return Outputs(torch.randn(len(counts), queries, classes + 1).requires_grad_(), boxes.requires_grad_())

    targets = [
        Target(torch.rand(n, 4) * 0.4 + 0.1, torch.randint(0, classes, (n,)), i, (9, 9)) for i, n in enumerate(counts)
    ]
    *auxiliary, last = [layer() for _ in range(layers)]
    return last._replace(auxiliary=tuple(auxiliary)), targets


def test_losses_equal_their_definitions_in_every_layer() -> None:
    outputs, targets = drawn([2, 0, 4])
    config = LossConfig()
    got = compute_losses(outputs, targets, 6.0, config)
    expected_total = 0.0
    for suffix, layer in zip(["", "_0", "_1"], [outputs, *outputs.auxiliary], strict=True):
        classes, distance, iou = torch.full((3, 8), 5), 0.0, 0.0
        for image, (query, found) in enumerate(match(layer, targets, config)):
            classes[image, query] = targets[image].labels[found]
            predicted, true = layer.boxes[image, query], targets[image].boxes[found]
            distance += F.l1_loss(predicted, true, reduction="sum").item()
            iou += sum(slow_giou(p.tolist(), t.tolist()) for p, t in zip(predicted, true, strict=True))
        weight = torch.tensor([1.0] * 5 + [config.eos_coef])
        ce = F.cross_entropy(layer.logits.flatten(0, 1), classes.flatten(), weight).item()
        assert got.parts[f"loss_ce{suffix}"].item() == pytest.approx(ce, rel=1e-5)
        assert got.parts[f"loss_bbox{suffix}"].item() == pytest.approx(distance / 6, rel=1e-5)
        assert got.parts[f"loss_giou{suffix}"].item() == pytest.approx((6 - iou) / 6, rel=1e-5)
        expected_total += ce + 5 * distance / 6 + 2 * (6 - iou) / 6
    assert got.total.item() == pytest.approx(expected_total, rel=1e-5)
    assert not any(term.requires_grad for term in got.parts.values())


def slow_giou(a: list[float], b: list[float]) -> float:
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    width = max(0.0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2))
    height = max(0.0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2))
    hull_width = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    hull_height = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    union = aw * ah + bw * bh - width * height
    return width * height / union - (hull_width * hull_height - union) / (hull_width * hull_height)


def test_batch_without_objects_trains_only_no_object() -> None:
    outputs, targets = drawn([0, 0])
    losses = compute_losses(outputs, targets, 1.0, LossConfig())
    losses.total.backward()
    assert losses.parts["loss_bbox"] == losses.parts["loss_giou"] == 0
    assert losses.parts["class_error"] == 100
    assert outputs.logits.grad is not None
    assert (outputs.logits.grad[..., -1] < 0).all()
    assert outputs.boxes.grad is None or not outputs.boxes.grad.any()


def test_more_objects_than_queries_give_finite_losses() -> None:
    outputs, targets = drawn([11, 3], queries=4)
    losses = compute_losses(outputs, targets, 14.0, LossConfig())
    losses.total.backward()
    assert losses.total.isfinite()
    assert ce_weight_sum(targets, 4, LossConfig()) == pytest.approx(7 + 1 * 0.1)


def test_objects_without_area_give_finite_gradients() -> None:
    outputs, targets = drawn([2])
    targets[0].boxes[:, 2:] = 0
    compute_losses(outputs, targets, 2.0, LossConfig()).total.backward()
    assert outputs.boxes.grad is not None
    assert outputs.boxes.grad.isfinite().all()


def test_loss_does_not_depend_on_the_number_of_ranks() -> None:
    """With normalisers summed over ranks, the sum of the ranks' losses is the loss of the batch."""
    outputs, targets = drawn([2, 0, 4, 1])
    config = LossConfig()
    expected = compute_losses(outputs, targets, 7.0, config)
    normalizer = ce_weight_sum(targets, 8, config)
    totals = []
    for rows in (slice(0, 1), slice(1, 4)):
        layers = [Outputs(layer.logits[rows], layer.boxes[rows]) for layer in (outputs, *outputs.auxiliary)]
        share = layers[0]._replace(auxiliary=tuple(layers[1:]))
        totals.append(compute_losses(share, targets[rows], 7.0, config, ce_normalizer=normalizer).total)
    torch.testing.assert_close(sum(totals), expected.total)


def test_default_normaliser_is_the_sum_of_class_weights() -> None:
    outputs, targets = drawn([2, 0, 4])
    config = LossConfig()
    given = compute_losses(outputs, targets, 6.0, config, ce_normalizer=ce_weight_sum(targets, 8, config))
    torch.testing.assert_close(given.total, compute_losses(outputs, targets, 6.0, config).total)


def test_auxiliary_losses_can_be_left_out() -> None:
    outputs, targets = drawn([2, 1])
    losses = compute_losses(outputs, targets, 3.0, LossConfig(auxiliary=False))
    assert set(losses.parts) == {"loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error"}


def test_errors_count_wrong_classes_and_wrong_numbers() -> None:
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1], [0.5, 0.5, 0.9, 0.9]])
    logits = 10 * F.one_hot(torch.tensor([1, 0, 3]), 4).float()
    truth = Target(boxes[:2], torch.tensor([1, 2]), 1, (9, 9))
    terms = compute_losses(Outputs(logits[None], boxes[None]), [truth], 2.0, LossConfig()).parts
    assert terms["class_error"] == 50
    assert terms["cardinality_error"] == 0


def test_losses_of_half_precision_predictions_use_full_precision() -> None:
    outputs, targets = drawn([2, 1], layers=1)
    half = Outputs(outputs.logits.bfloat16(), outputs.boxes)
    assert compute_losses(half, targets, 3.0, LossConfig()).total.dtype == torch.float32


SWITCHES = {"ce": "loss_ce", "bbox": "loss_bbox", "giou": "loss_giou"}


@pytest.mark.parametrize("off", [["ce"], ["bbox"], ["giou"], ["bbox", "giou"], ["ce", "bbox"]])
def test_weight_0_removes_a_loss_and_its_gradient(off: list[str]) -> None:
    config = LossConfig(**{f"weight_{name}": 0.0 for name in off})
    outputs, targets = drawn([2, 3])
    losses = compute_losses(outputs, targets, 5.0, config)
    losses.total.backward()
    on = {"ce": 1.0, "bbox": 5.0, "giou": 2.0}
    expected = sum(
        weight * losses.parts[SWITCHES[name] + suffix].item()
        for name, weight in on.items() if name not in off
        for suffix in ("", "_0", "_1")
    )  # fmt: skip
    assert losses.total.item() == pytest.approx(expected, rel=1e-5)
    for layer in (outputs, *outputs.auxiliary):
        # Zeros instead of None, because DDP waits for a gradient of every head.
        assert layer.logits.grad is not None
        assert layer.boxes.grad is not None
        assert layer.logits.grad.any() != ("ce" in off)
        assert layer.boxes.grad.any() != ("bbox" in off and "giou" in off)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_box_losses_that_are_off_do_not_spread_nan(value: float) -> None:
    """Boxes of targets and predictions are not multiplied by a weight of 0, since 0 times NaN is NaN."""
    outputs, targets = drawn([2, 3])
    config = LossConfig(cost_bbox=0, cost_giou=0, weight_bbox=0, weight_giou=0)
    expected = compute_losses(outputs, targets, 5.0, config).total
    targets[0].boxes[1, 2] = value
    with torch.no_grad():
        outputs.boxes[1, 4] = value
        outputs.auxiliary[0].boxes[:] = value
    losses = compute_losses(outputs, targets, 5.0, config)
    losses.total.backward()
    assert torch.equal(losses.total, expected)
    for layer in (outputs, *outputs.auxiliary):
        assert layer.boxes.grad is not None
        assert not layer.boxes.grad.any()
        assert layer.logits.grad is not None
        assert layer.logits.grad.isfinite().all()


def test_class_losses_that_are_off_do_not_spread_nan() -> None:
    outputs, targets = drawn([2, 3])
    config = LossConfig(cost_class=0, weight_ce=0)
    expected = compute_losses(outputs, targets, 5.0, config).total
    with torch.no_grad():
        outputs.logits[1, 4, 2] = torch.nan
    losses = compute_losses(outputs, targets, 5.0, config)
    losses.total.backward()
    assert torch.equal(losses.total, expected)
    assert outputs.logits.grad is not None
    assert not outputs.logits.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_losses_on_a_device_equal_those_on_the_host() -> None:
    outputs, targets = drawn([2, 0, 4])
    layers = [Outputs(layer.logits.cuda(), layer.boxes.cuda()) for layer in (outputs, *outputs.auxiliary)]
    moved = layers[0]._replace(auxiliary=tuple(layers[1:]))
    expected = compute_losses(outputs, targets, 6.0, LossConfig())
    torch.testing.assert_close(compute_losses(moved, targets, 6.0, LossConfig()).total.cpu(), expected.total)
