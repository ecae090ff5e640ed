"""Properties of the loss in edge cases: any canvas, as many objects as queries, degenerate boxes, non-finite values."""

import math
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.backbone import FrozenBatchNorm
from detr.batch import Target, collate
from detr.config import LossConfig, ModelConfig
from detr.criterion import compute_losses
from detr.matcher import NonFiniteError, match
from detr.model import DETR, Outputs, build_model

CLASSES = 4
SETTINGS = settings(max_examples=40, deadline=None)
STRIDE, MARGIN = 16, 64  # of the tiny backbone: pixels per cell; more than a cell sees past itself (43 pixels)


def drawn_boxes(count: int, low: float, high: float, extents: tuple[float, float]) -> torch.Tensor:
    centres = low + (high - low) * torch.rand(count, 2)
    return torch.cat([centres, extents[0] + (extents[1] - extents[0]) * torch.rand(count, 2)], -1)


def drawn(counts: list[int], queries: int, layers: int = 2) -> tuple[Outputs, list[Target]]:
    """Return predictions that are leaves with gradients, those of the last layer first."""
    found = [
        Outputs(
            torch.randn(len(counts), queries, CLASSES + 1).requires_grad_(),
            torch.rand(len(counts), queries, 4).requires_grad_(),
        )
        for _ in range(layers)
    ]
    targets = [
        Target(drawn_boxes(n, 0.2, 0.8, (0.05, 0.4)), torch.randint(0, CLASSES, (n,)), 100 + row, (9, 9))
        for row, n in enumerate(counts)
    ]
    return found[0]._replace(auxiliary=tuple(found[1:])), targets


def detector(position: Literal["sine", "learned"]) -> DETR:
    """Return a DETR whose frozen statistics are not neutral, so that padding is not zero past the first convolution."""
    torch.manual_seed(0)
    config = ModelConfig(
        backbone="tiny", position=position, hidden_dim=32, heads=4, encoder_layers=2, decoder_layers=2,
        feedforward_dim=32, num_queries=6,
    )  # fmt: skip
    model = build_model(config, CLASSES).eval()
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm):
            module.bias.uniform_(0.1, 0.5)
            module.running_mean.normal_()
    return model


DETECTORS = [detector("sine"), detector("learned")]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 2**31),
    st.tuples(st.integers(17, 80), st.integers(17, 80)),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=2, unique=True),
    st.sampled_from(DETECTORS),
)
def test_loss_does_not_depend_on_the_canvas(
    seed: int, size: tuple[int, int], canvases: list[tuple[int, int]], model: DETR
) -> None:
    """Compare canvases of complete cells that extend beyond the receptive fields of the image's cells.

    On a tighter canvas the backbone sees the canvas's edge, which is zeros in every layer, instead of padding.
    """
    torch.manual_seed(seed)
    image = torch.randn(3, *size)
    targets = [Target(drawn_boxes(3, 0.2, 0.8, (0.05, 0.4)), torch.randint(0, CLASSES, (3,)), 1, (9, 9))]
    losses, found = [], []
    for extra in canvases:
        # The canvas is as large as the other image of the batch.
        height, width = (
            math.ceil(pixels / STRIDE) * STRIDE + MARGIN + STRIDE * more
            for pixels, more in zip(size, extra, strict=True)
        )
        other = (torch.randn(3, height, width), Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, (9, 9)))
        batch = collate([(image, targets[0]), other])
        with torch.inference_mode():
            outputs = model(batch.images, batch.padding)
        layers = [Outputs(layer.logits[:1], layer.boxes[:1]) for layer in (outputs, *outputs.auxiliary)]
        own = layers[0]._replace(auxiliary=tuple(layers[1:]))
        found.append(own)
        losses.append(compute_losses(own, targets, 3.0, LossConfig()).total)
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0].boxes, found[1].boxes, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 40))
def test_hundred_queries_match_a_hundred_or_more_boxes(seed: int, surplus: int) -> None:
    torch.manual_seed(seed)
    truth = Target(
        drawn_boxes(100 + surplus, 0, 1, (0.01, 0.9)), torch.randint(0, CLASSES, (100 + surplus,)), 1, (9, 9)
    )
    order = torch.randperm(100 + surplus)[:100]
    logits = 20 * torch.nn.functional.one_hot(truth.labels[order], CLASSES + 1).float()
    perfect = Outputs(logits[None].requires_grad_(), truth.boxes[order][None].requires_grad_())
    ((query, found),) = match(perfect, [truth], LossConfig())
    assert query.tolist() == list(range(100))
    assert found.tolist() == order.tolist()
    losses = compute_losses(perfect, [truth], 100.0, LossConfig())
    losses.total.backward()
    assert losses.total.item() < 1e-4
    assert losses.parts["class_error"] == losses.parts["cardinality_error"] - surplus == 0


@SETTINGS
@given(st.integers(0, 2**31), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_odd_boxes_give_finite_losses_and_gradients(seed: int, counts: list[int], flat: bool, far: bool) -> None:
    torch.manual_seed(seed)
    outputs, targets = drawn(counts, 5)
    centres, extents = ((-3.0, 4.0) if far else (0.0, 1.0)), ((0.0, 0.0) if flat else (0.0, 5.0 if far else 1.0))
    targets = [
        Target(drawn_boxes(len(target.labels), *centres, extents), target.labels, target.image_id, target.original_size)
        for target in targets
    ]
    for layer in (outputs, *outputs.auxiliary):
        with torch.no_grad():
            layer.boxes.copy_(drawn_boxes(layer.boxes[..., 0].numel(), *centres, extents).view_as(layer.boxes))
            if targets and len(targets[0].boxes):
                layer.boxes[0, 0] = targets[0].boxes[0]  # a box that equals its object and may be empty
    losses = compute_losses(outputs, targets, 1.0, LossConfig())
    losses.total.backward()
    assert losses.total.isfinite()
    assert all(term.isfinite() for term in losses.parts.values())
    for layer in (outputs, *outputs.auxiliary):
        for tensor in (layer.logits, layer.boxes):
            assert tensor.grad is None or tensor.grad.isfinite().all()


@SETTINGS
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(
        st.tuples(
            st.sampled_from(["logits", "boxes", "target boxes"]),
            st.integers(0, 1),
            st.integers(0, 3),
            st.sampled_from([float("nan"), float("inf")]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_non_finite_value_error_names_tensor_and_image(
    seed: int, counts: list[int], broken: list[tuple[str, int, int, float]]
) -> None:
    torch.manual_seed(seed)
    outputs, targets = drawn(counts, 5)
    guilty: dict[str, set[int]] = {}
    for name, layer, where, value in broken:
        image = where % len(counts)
        if name == "target boxes":
            targets[image].boxes[where % counts[image], where] = value
        else:
            with torch.no_grad():
                getattr((outputs, *outputs.auxiliary)[layer], name)[image, where, where] = value
        guilty.setdefault(name, set()).add(100 + image)
    with pytest.raises(NonFiniteError) as caught:
        compute_losses(outputs, targets, 1.0, LossConfig())
    message = str(caught.value)
    named = " and ".join(
        f"{name} of images {', '.join(map(str, sorted(guilty[name])))}"
        for name in ("logits", "boxes", "target boxes")
        if name in guilty
    )
    assert f"non-finite values in the {named}, expected finite ones" in message
    assert "\n" not in message
