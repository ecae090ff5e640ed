"""Losses and errors of matched pairs that the variants share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from detr.matcher import Assignment, PackedTargets, generalized_iou


def box_losses(boxes: Tensor, targets: PackedTargets, found: Assignment) -> dict[str, Tensor]:
    """Return the sums [L] of L1 and of 1 - GIoU over matched pairs; every layer has the same number of pairs."""
    predicted = boxes.flatten(0, 2).index_select(0, found.slot)
    true = targets.boxes.index_select(0, found.truth)
    per_layer = (len(boxes), len(predicted) // len(boxes))
    return {
        "loss_bbox": (predicted - true).abs().view(*per_layer, 4).sum((1, 2)),
        "loss_giou": (1 - generalized_iou(predicted, true)).view(per_layer).sum(1),
    }


def class_error(scores: Tensor, labels: Tensor, found: Assignment) -> Tensor:
    """Return the percentage of the last layer's matched queries with a wrong best class; 100 without matched queries.

    scores: [L, B, Q, classes], the last layer first. labels: of the matched objects, in the order of `found`.
    """
    matched = len(labels) // len(scores)
    if not matched:
        return torch.full((), 100.0, device=labels.device)
    best = scores[0, found.image[:matched], found.query[:matched]].argmax(-1)
    return 100 * (best != labels[:matched]).float().mean()


def zero_with_gradient(predictions: Sequence[Tensor]) -> Tensor:
    """Return 0 with zero gradients, even for NaN: DDP waits for gradients of all heads, also if their loss is off."""
    return torch.stack([prediction[:0].sum(dtype=torch.float32) for prediction in predictions]).sum()
