"""The optimal assignment of queries to objects, section 3.1 of the paper, for all decoder layers and images at once.

One block of costs is computed on the device, each image only against its own objects, and comes to the host in one
transfer, where scipy solves each (layer, image) exactly. The original computes every image against the objects of all,
in one call per layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from detr.batch import Target
from detr.config import LossConfig
from detr.model import Outputs


class NonFiniteError(ValueError):
    """A prediction or a target holds NaN or infinity. The message names the part and the image ids."""


@dataclass(frozen=True, eq=False)
class PackedTargets:
    """The targets of a batch as two padded tensors on the device: labels [B, N], boxes [B, N, 4]; N = most objects."""

    labels: Tensor
    boxes: Tensor
    counts: tuple[int, ...]
    image_ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Assignment:
    """Matched pairs of all layers, as int64 [M] each: layer by layer, in a layer image by image, queries ascending."""

    layer: Tensor
    image: Tensor
    query: Tensor
    target: Tensor


def match(outputs: Outputs, targets: Sequence[Target], config: LossConfig) -> list[tuple[Tensor, Tensor]]:
    """Assign queries to objects by the last layer's predictions: (query indices, target indices) per image, int64.

    Each has min(objects, queries) entries, queries ascending. Raises NonFiniteError for costs that are not finite.
    """
    packed = pack(targets, outputs.logits.shape[-1] - 1, outputs.logits.device)
    found = match_layers(outputs.logits.detach()[None], outputs.boxes.detach()[None], packed, config)
    return [(found.query[found.image == row], found.target[found.image == row]) for row in range(len(targets))]


def pack(targets: Sequence[Target], num_classes: int, device: torch.device) -> PackedTargets:
    """Pack targets and move them with one copy each; ValueError for a label the model has no class for."""
    counts = tuple(len(target.labels) for target in targets)
    for target in targets:
        # Only on the host, where it costs no synchronisation; there the labels are, unless someone moved them.
        if target.labels.device.type == "cpu" and len(target.labels):
            low, high = target.labels.aminmax()
            if low < 0 or high >= num_classes:
                raise ValueError(
                    f"image {target.image_id}: got labels {int(low)} to {int(high)}, expected 0 to {num_classes - 1}; "
                    "build the model with the data set's number of classes"
                )
    if not targets:
        labels, boxes = torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, 4)
    else:
        labels = pad_sequence([target.labels for target in targets], batch_first=True)
        boxes = pad_sequence([target.boxes for target in targets], batch_first=True, padding_value=0.5)
    image_ids = tuple(target.image_id for target in targets)
    labels, boxes = labels.to(device, non_blocking=True), boxes.to(device, torch.float32, non_blocking=True)
    return PackedTargets(labels, boxes, counts, image_ids)


def match_layers(logits: Tensor, boxes: Tensor, targets: PackedTargets, config: LossConfig) -> Assignment:
    """Match every layer: logits [L, B, Q, K + 1] and boxes [L, B, Q, 4], both without gradients."""
    costs = _costs(logits, boxes, targets, config).cpu().numpy()
    pairs: list[np.ndarray] = []
    for layer, image in np.ndindex(costs.shape[:2]):
        cost = costs[layer, image, :, : targets.counts[image]]
        if not np.isfinite(cost).all():
            raise NonFiniteError(_describe(logits, boxes, targets))
        query, target = linear_sum_assignment(cost)
        pairs.append(np.stack([np.full_like(query, layer), np.full_like(query, image), query, target]))
    joined = np.concatenate(pairs, axis=1) if pairs else np.zeros((4, 0), np.int64)
    return Assignment(*torch.from_numpy(joined.astype(np.int64)).to(logits.device, non_blocking=True))


def _costs(logits: Tensor, boxes: Tensor, targets: PackedTargets, config: LossConfig) -> Tensor:
    """Return fp32 costs [L, B, Q, N]: class probability, L1 and GIoU, weighted."""
    layers, _, queries, _ = logits.shape
    wanted = targets.labels[None, :, None, :].expand(layers, -1, queries, -1)
    probability = logits.float().softmax(-1).gather(-1, wanted)
    predicted, true = boxes.float().unsqueeze(-2), targets.boxes[None, :, None]
    # A broadcast difference: cdist(p=1) is several times slower on a GPU.
    distance = (predicted - true).abs().sum(-1)
    giou = generalized_iou(predicted, true)
    return config.cost_bbox * distance - config.cost_class * probability - config.cost_giou * giou


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the generalised IoU (Rezatofighi et al., 2019), -1 to 1, of cxcywh boxes [..., 4] that broadcast.

    Boxes without area count as points and lines: nothing is divided by zero.
    """
    a_low, a_high = a[..., :2] - a[..., 2:] / 2, a[..., :2] + a[..., 2:] / 2
    b_low, b_high = b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2
    overlap = _area((torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0))
    hull = _area(torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low))
    union = _area(a[..., 2:]) + _area(b[..., 2:]) - overlap
    tiny = 1e-12  # a millionth of a pixel in a 1000 x 1000 image: real areas are never changed
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def _area(extents: Tensor) -> Tensor:
    # Not prod(-1): its gradient asks the device whether there are zeros, and waits for the answer.
    return extents[..., 0] * extents[..., 1]


def _describe(logits: Tensor, boxes: Tensor, targets: PackedTargets) -> str:
    parts = {"logits": logits.isfinite().all(-1), "boxes": boxes.isfinite().all(-1)}
    named = []
    for part, finite in parts.items():
        rows = (~finite.all(-1).all(0)).nonzero().flatten().tolist()
        if rows:
            named.append(f"{part} of images {', '.join(str(targets.image_ids[row]) for row in rows)}")
    where = " and ".join(named) or "the target boxes"
    remedy = "lower the learning rate or check the data"
    return f"matching: got non-finite values in the {where}, expected finite ones; {remedy}"
