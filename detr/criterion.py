"""The set loss of section 3.1: cross entropy, L1 and generalised IoU of matched pairs, in every decoder layer.

All decoder layers and images are one set of tensors, and nothing waits for the device but the one transfer of the
matcher. The normalisers depend on the targets alone; summing them over ranks is the caller's, who owns collectives.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detr.batch import Target
from detr.config import LossConfig
from detr.mask_losses import mask_losses
from detr.matcher import Assignment, PackedTargets, generalized_iou, match_layers, pack
from detr.model import Outputs


class Losses(NamedTuple):
    """total: weighted sum, with gradients. parts: unweighted, without gradients, under the original's names.

    Parts are `loss_ce`, `loss_bbox`, `loss_giou`, `cardinality_error` (mean over images) and `class_error` (percent)
    of the last layer, and the first four with a suffix `_0`, `_1`, ... of the layers before it. A mask head adds
    `loss_mask` and `loss_dice`, of the last layer alone.
    """

    total: Tensor
    parts: dict[str, Tensor]


def compute_losses(
    outputs: Outputs,
    targets: Sequence[Target],
    num_boxes: float | Tensor,
    config: LossConfig,
    ce_normalizer: float | Tensor | None = None,
    canvas: tuple[int, int] | None = None,
) -> Losses:
    """Match, then compute every loss.

    num_boxes: what L1 and GIoU sums are divided by, above 0. The original's is max(boxes over all ranks / ranks, 1).
    ce_normalizer: what cross-entropy sums are divided by; None is the original's, `ce_weight_sum` of this call.
    canvas: (height, width) in pixels of the padded images, for `mask_losses`.
    Raises NonFiniteError where nothing can be matched, ValueError for labels out of range, ConfigError where the model
    has a mask head and an image no masks.
    """
    layers = [outputs, *(outputs.auxiliary if config.auxiliary else ())]
    logits = torch.stack([layer.logits for layer in layers]).float()
    boxes = torch.stack([layer.boxes for layer in layers]).float()
    packed = pack(targets, logits.shape[-1] - 1, logits.device)
    found = match_layers(logits.detach(), boxes.detach(), packed, config)
    if ce_normalizer is None:
        # 0 only without images, where the sum is 0 as well.
        ce_normalizer = ce_weight_sum(targets, logits.shape[2], config) or 1.0

    classes = torch.full(logits.shape[:3], logits.shape[-1] - 1, device=logits.device)
    matched_labels = packed.labels[found.image, found.target]
    classes[found.layer, found.image, found.query] = matched_labels
    per_layer = {
        "loss_ce": _cross_entropy(logits, classes, config.eos_coef) / ce_normalizer,
        **{name: value / num_boxes for name, value in _box_losses(boxes, packed, found).items()},
        "cardinality_error": _cardinality_error(logits.detach(), packed),
    }
    weights = {"loss_ce": config.weight_ce, "loss_bbox": config.weight_bbox, "loss_giou": config.weight_giou}
    total = torch.stack([weight * per_layer[name].sum() for name, weight in weights.items()]).sum()
    parts = {"class_error": _class_error(logits.detach(), matched_labels, found)}
    if outputs.masks is not None:
        sums = mask_losses(outputs.masks, targets, found, len(layers), canvas)
        parts |= {name: value.detach() / num_boxes for name, value in sums.items()}
        total = total + (config.weight_mask * sums["loss_mask"] + config.weight_dice * sums["loss_dice"]) / num_boxes
    for name, values in per_layer.items():
        for index, value in enumerate(values.detach().unbind()):
            parts[name if index == 0 else f"{name}_{index - 1}"] = value
    return Losses(total, parts)


def ce_weight_sum(targets: Sequence[Target], num_queries: int, config: LossConfig) -> float:
    """Return the sum of the cross entropy's class weights over the queries of these images: its normaliser.

    It is known before the forward pass: each image has min(objects, queries) matched queries of weight 1, and the rest
    weigh `eos_coef`. Summed over ranks and divided by their number, it makes the loss independent of their number.
    """
    matched = sum(min(len(target.labels), num_queries) for target in targets)
    return matched + (len(targets) * num_queries - matched) * config.eos_coef


def _cross_entropy(logits: Tensor, classes: Tensor, eos_coef: float) -> Tensor:
    """Return the weighted sums [L] over images and queries; the last class, no object, weighs `eos_coef`."""
    no_object = logits.shape[-1] - 1
    losses = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), reduction="none").view_as(classes)
    return torch.where(classes == no_object, eos_coef * losses, losses).sum((1, 2))


def _box_losses(boxes: Tensor, targets: PackedTargets, found: Assignment) -> dict[str, Tensor]:
    """Return the sums [L] of L1 and of 1 - GIoU over matched pairs; every layer has the same number of them."""
    predicted = boxes[found.layer, found.image, found.query]
    true = targets.boxes[found.image, found.target]
    per_layer = (len(boxes), len(predicted) // len(boxes))
    return {
        "loss_bbox": (predicted - true).abs().sum(-1).view(per_layer).sum(1),
        "loss_giou": (1 - generalized_iou(predicted, true)).view(per_layer).sum(1),
    }


def _cardinality_error(logits: Tensor, targets: PackedTargets) -> Tensor:
    """Return [L]: by how many the queries that say "object" miss the number of objects, averaged over images."""
    said = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    counts = torch.tensor(targets.counts, dtype=torch.int64).to(logits.device, non_blocking=True)
    return (said - counts).abs().sum(-1) / max(len(targets.counts), 1)


def _class_error(logits: Tensor, labels: Tensor, found: Assignment) -> Tensor:
    """Return in percent how many of the last layer's matched queries have a wrong best class; 100 where none matched.

    logits: [L, B, Q, K + 1], the last layer first. labels: those of the matched objects, as in `found`.
    """
    matched = len(labels) // len(logits)
    if not matched:
        return torch.full((), 100.0, device=logits.device)
    best = logits[0, found.image[:matched], found.query[:matched]].argmax(-1)
    return 100 * (best != labels[:matched]).float().mean()
