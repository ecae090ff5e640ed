"""Losses and errors of matched pairs that the variants share."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from detr.matcher import TINY_AREA, Assignment, PackedTargets, area


def box_losses(boxes: Tensor, targets: PackedTargets, found: Assignment) -> dict[str, Tensor]:
    """Return the sums [L] of L1 and of 1 - GIoU over matched pairs; every layer has the same number of pairs."""
    predicted = boxes.flatten(0, 2).index_select(0, found.slot)
    true = targets.boxes.index_select(0, found.truth)
    l1, giou = _BoxLosses.apply(predicted.T, true.T, len(boxes))
    return {"loss_bbox": l1, "loss_giou": giou}


class _BoxLosses(torch.autograd.Function):
    """Sums [layers] of L1 and of 1 - GIoU for cxcywh coordinates [4, N]; the N pairs are layer by layer.

    It takes the place of `1 - generalized_iou`, whose forward and backward pass launch twice as many kernels, each for a few
    hundred numbers. The gradient is autograd's, ties and boxes without area included; the forward pass computes it.
    """

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, true: Tensor, layers: int) -> tuple[Tensor, Tensor]:
        difference, extents = boxes - true, boxes[2:]
        low, high = _corners(boxes)
        true_low, true_high = _corners(true)
        both = torch.minimum(high, true_high) - torch.maximum(low, true_low)
        hull = torch.maximum(high, true_high) - torch.minimum(low, true_low)
        inside = both.clamp(min=0)
        overlap, hull_area = area(inside), area(hull)
        union = area(extents) + area(true[2:]) - overlap
        safe_union, safe_hull = union.clamp(min=TINY_AREA), hull_area.clamp(min=TINY_AREA)
        iou, empty = overlap / safe_union, (hull_area - union) / safe_hull
        # Derivatives of GIoU = iou - empty by the areas: of the union, of the overlap (also a term of the union), of the hull.
        by_union = 1 / safe_hull - (union >= TINY_AREA) * iou / safe_union
        by_overlap = 1 / safe_union - by_union
        by_hull = ((hull_area >= TINY_AREA) * empty - 1) / safe_hull
        # Each corner bounds the overlap or the hull; where it equals the true one, half of each, as autograd has it.
        by_inside = by_overlap * inside.flip(0) * (both >= 0)
        by_extents = by_hull * hull.flip(0)
        at_high = torch.lerp(by_extents, by_inside, (true_high - high).sign().add_(1).mul_(0.5))
        at_low = torch.lerp(by_extents, by_inside, (low - true_low).sign().add_(1).mul_(0.5))
        slopes = torch.cat([at_high - at_low, (at_high + at_low).mul_(0.5).add_(by_union * extents.flip(0))])
        ctx.save_for_backward(difference.sign(), slopes)
        sums = difference.abs().view(4, layers, -1).sum((0, 2)), (1 - (iou - empty)).view(layers, -1).sum(1)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, by_l1: Tensor, by_giou: Tensor) -> tuple[Tensor | None, ...]:
        signs, slopes = (each.view(4, len(by_l1), -1) for each in ctx.saved_tensors)
        return (signs * by_l1[:, None] - slopes * by_giou[:, None]).flatten(1), None, None


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low and the high corners [2, N] of cxcywh coordinates [4, N]."""
    centres, extents = boxes.chunk(2)
    return torch.sub(centres, extents, alpha=0.5), torch.add(centres, extents, alpha=0.5)


def class_error(scores: Tensor, labels: Tensor, found: Assignment) -> Tensor:
    """Return the percentage of the last layer's matched queries with a wrong best class; 100 without matched queries.

    scores: [L, B, Q, classes], the last layer first. labels: of the matched objects, in the order of `found`.
    """
    matched = len(labels) // len(scores)
    if not matched:
        return torch.full((), 100.0, device=labels.device)
    best = scores[0, found.image[:matched], found.query[:matched]].argmax(-1)
    return 100 * (best != labels[:matched]).float().mean()


def count_error(objects: Tensor, targets: PackedTargets) -> Tensor:
    """Return [L], the mean over images of |predicted objects - true ones|, for the predicted [L, B]."""
    counts = torch.tensor(targets.counts, dtype=torch.int64).to(objects.device, non_blocking=True)
    return (objects - counts).abs().sum(-1) / max(len(targets.counts), 1)


def named(per_layer: Mapping[str, Tensor], suffix: str = "") -> dict[str, Tensor]:
    """Return each layer's values [L] without gradient, by the original's names: the last layer's, then `_0`, `_1`, ..."""
    return {
        (name if index == 0 else f"{name}_{index - 1}") + suffix: value
        for name, values in per_layer.items()
        for index, value in enumerate(values.detach().unbind())
    }


def zero_with_gradient(predictions: Sequence[Tensor]) -> Tensor:
    """Return 0 with zero gradients, even for NaN: DDP waits for gradients of all heads, also if their loss is off."""
    return torch.stack([prediction[:0].sum(dtype=torch.float32) for prediction in predictions]).sum()
