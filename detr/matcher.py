"""Optimal assignment of queries to objects, section 3.1 of the paper, for all decoder layers and images at once.

The objects of a batch are packed into one row, and one block of costs [objects, layers, queries] is computed on the
device, each object only against the queries of its own image. One transfer moves it to the host, where scipy solves each
(image, layer) exactly. The original computes every image against the objects of all images, in one call per layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detr.batch import Target
from detr.config import LossConfig
from detr.variant import Outputs, SigmoidOutputs

Ints = NDArray[np.int64]
_Extents = tuple[Tensor, Tensor, Tensor]
_TINY_PROBABILITY = 1e-8  # keeps logarithms finite, as in the original
TINY_AREA = 1e-12
"""Smallest divisor of areas: a millionth of a pixel in a 1000 x 1000 image, so real areas are never changed."""


class NonFiniteError(ValueError):
    """Raised for NaN or infinity in a prediction or target; the message names the tensor and the image ids."""


@dataclass(frozen=True, eq=False)
class PackedTargets:
    """Objects of a batch in one row, image by image, on the device: labels [T], boxes [T, 4], cxcywh.

    image: [T], the index in the batch of each object's image. counts: number of objects of each image, on the host.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    counts: tuple[int, ...]
    image_ids: tuple[int, ...]

    @cached_property
    def starts(self) -> Ints:
        """Index of each image's first object in the row, and the number of objects: [B + 1]."""
        return np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Assignment:
    """Matched pairs of all layers, as int64 [M] each: layer by layer, in a layer image by image, queries ascending.

    target is the object's index in its image, truth its index in the batch. slot is the query's index among those of
    all layers and images: (layer * B + image) * Q + query. Every layer has the same number of pairs.
    """

    image: Tensor
    query: Tensor
    target: Tensor
    truth: Tensor
    slot: Tensor


def match(
    outputs: Outputs | SigmoidOutputs, targets: Sequence[Target], config: LossConfig
) -> list[tuple[Tensor, Tensor]]:
    """Return (query indices, target indices), int64, for each image, matched by the last layer's predictions.

    Each has min(objects, queries) entries, queries ascending. Raise `NonFiniteError` for costs that are not finite.
    """
    scores, boxes = outputs.logits.detach()[None].float(), outputs.boxes.detach()[None]
    if isinstance(outputs, SigmoidOutputs):
        packed = pack(targets, outputs.logits.shape[-1], outputs.logits.device)
        found = match_layers(scores, boxes, packed, config, focal_cost)
    else:
        packed = pack(targets, outputs.logits.shape[-1] - 1, outputs.logits.device)
        found = match_layers(scores.log_softmax(-1), boxes, packed, config)
    return [(found.query[found.image == row], found.target[found.image == row]) for row in range(len(targets))]


def pack(targets: Sequence[Target], num_classes: int, device: torch.device) -> PackedTargets:
    """Pack targets and move them with one copy each; raise `ValueError` for a label the model has no class for."""
    counts = tuple(len(target.labels) for target in targets)
    labels = torch.cat([target.labels for target in targets]) if targets else torch.zeros(0, dtype=torch.int64)
    boxes = torch.cat([target.boxes for target in targets]) if targets else torch.zeros(0, 4)
    # Labels are checked on the host only, where they usually are: on a device, the check would have to synchronise.
    if labels.device.type == "cpu" and len(labels):
        low, high = labels.aminmax()
        if low < 0 or high >= num_classes:
            raise ValueError(_describe_labels(targets, num_classes))
    image = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    return PackedTargets(
        labels.to(device, non_blocking=True),
        boxes.to(device, torch.float32, non_blocking=True),
        image.to(device, non_blocking=True),
        counts,
        tuple(target.image_id for target in targets),
    )


def probability_cost(log_probabilities: Tensor, config: LossConfig) -> Tensor:
    """Return -p, in place, for the log probabilities of the objects' classes."""
    return log_probabilities.exp_().neg_()


def focal_cost(logits: Tensor, config: LossConfig) -> Tensor:
    """Return the change of the focal loss if the objects' classes are true, for their logits (Deformable DETR)."""
    probability, alpha = logits.sigmoid(), config.focal_alpha
    if_true = alpha * (1 - probability).square() * -(probability + _TINY_PROBABILITY).log()
    return if_true + (1 - alpha) * probability.square() * (1 - probability + _TINY_PROBABILITY).log()


def match_layers(
    scores: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    config: LossConfig,
    class_cost: Callable[[Tensor, LossConfig], Tensor] = probability_cost,
) -> Assignment:
    """Return the pairs of every layer, for fp32 scores [L, B, Q, classes] and boxes [L, B, Q, 4], without gradients.

    `class_cost` makes costs [T, L, Q] of a copy of the scores of the objects' classes: log probabilities by default.
    Raise `NonFiniteError` for costs that are not finite.
    """
    costs = _costs(scores, boxes, targets, config, class_cost).cpu().numpy()
    if not np.isfinite(costs).all():
        raise NonFiniteError(_describe(scores, boxes, targets))
    device = scores.device
    return Assignment(*torch.from_numpy(_solve(costs, targets.starts)).to(device, non_blocking=True))


def _solve(costs: NDArray[np.float32], starts: Ints) -> Ints:
    """Return the five rows of an Assignment for costs [T, L, Q]."""
    images, blocks = len(starts) - 1, list(pairwise(starts.tolist()))
    # scipy takes contiguous doubles; converting all blocks at once is faster.
    doubles = np.ascontiguousarray(costs.transpose(1, 0, 2), np.float64)
    solved = [linear_sum_assignment(layer[start:end]) for layer in doubles for start, end in blocks]
    if not solved:
        return np.zeros((5, 0), np.int64)
    target = np.concatenate([rows for rows, _ in solved])
    query = np.concatenate([columns for _, columns in solved])
    block = np.repeat(np.arange(len(solved)), [len(rows) for rows, _ in solved])
    order = np.lexsort((query, block))
    image = block % images  # the same before and after the sort, as is the block
    query, target = query[order], target[order]
    slot = block * costs.shape[2] + query
    return np.stack([image, query, target, starts[image] + target, slot]).astype(np.int64, copy=False)


def _costs(
    scores: Tensor,
    boxes: Tensor,
    targets: PackedTargets,
    config: LossConfig,
    class_cost: Callable[[Tensor, LossConfig], Tensor],
) -> Tensor:
    """Return fp32 costs [T, L, Q]: weighted cost of the class, L1 and GIoU; terms of weight 0 are not computed.

    The queries are the innermost dimension because rows of coordinates or of objects would be short.
    """
    # [4, T, L, Q] of the queries and [4, T, 1, 1] of the objects; each object is compared with its image's queries.
    predicted = boxes.float().permute(3, 1, 0, 2).contiguous().index_select(1, targets.image)
    true = targets.boxes.T[:, :, None, None]
    # Broadcast differences, since cdist(p=1) is several times slower on a GPU.
    if config.cost_bbox:
        costs = (predicted - true).abs_().sum(0).mul_(config.cost_bbox)
    else:
        costs = predicted.new_zeros(predicted.shape[1:])
    if config.cost_class:
        own_class = scores.permute(1, 3, 0, 2)[targets.image, targets.labels]
        costs.add_(class_cost(own_class, config), alpha=config.cost_class)
    if config.cost_giou:
        costs.sub_(_giou(_extents(predicted), _extents(true)), alpha=config.cost_giou)
    return costs


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU (Rezatofighi et al., 2019), -1 to 1, of cxcywh boxes [..., 4] that broadcast.

    Boxes without area are valid: there is no division by zero.
    """
    return _giou(_extents(a.movedim(-1, 0)), _extents(b.movedim(-1, 0)))


def _extents(boxes: Tensor) -> _Extents:
    """Return low corners [2, ...], high corners [2, ...] and areas [...] of cxcywh coordinates [4, ...]."""
    centres, extents = boxes.chunk(2)
    halves = extents / 2
    return centres - halves, centres + halves, area(extents)


def _giou(a: _Extents, b: _Extents) -> Tensor:
    """Return the generalised IoU of boxes given by their `_extents`."""
    (a_low, a_high, a_area), (b_low, b_high, b_area) = a, b
    overlap = area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    hull = area(torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low))
    union = a_area + b_area - overlap
    return overlap / union.clamp(min=TINY_AREA) - (hull - union) / hull.clamp(min=TINY_AREA)


def area(extents: Tensor) -> Tensor:
    """Return the product [...] of widths and heights [2, ...]."""
    # Not prod(0), whose gradient waits for the device to find out whether there are zeros.
    width, height = extents.unbind()
    return width * height


def _describe_labels(targets: Sequence[Target], num_classes: int) -> str:
    def fits(target: Target) -> bool:
        return bool(((target.labels >= 0) & (target.labels < num_classes)).all())

    target = next(target for target in targets if not fits(target))
    low, high = target.labels.aminmax()
    return (
        f"image {target.image_id}: got labels {int(low)} to {int(high)}, expected 0 to {num_classes - 1}; "
        "build the model with the data set's number of classes"
    )


def _describe(scores: Tensor, boxes: Tensor, targets: PackedTargets) -> str:
    # A logit that is NaN or +infinity makes its whole row NaN; a logit of -infinity is a probability of 0.
    rows_of = {
        "logits": scores.isnan().any(-1).any(-1).any(0).nonzero().flatten(),
        "boxes": (~boxes.isfinite()).any(-1).any(-1).any(0).nonzero().flatten(),
        "target boxes": targets.image[(~targets.boxes.isfinite()).any(-1)],
    }
    named = [
        f"{name} of images {', '.join(str(targets.image_ids[row]) for row in sorted({*rows.tolist()}))}"
        for name, rows in rows_of.items()
        if len(rows)
    ]
    where = " and ".join(named) or "costs"
    remedy = "lower the learning rate or check the data"
    return f"matching: got non-finite values in the {where}, expected finite ones; {remedy}"
