"""Conversion of predictions to detections in pixels: the best class of every query, without NMS.

Models with a sigmoid per class give the 100 best pairs of a query and a class instead, as Deformable DETR does.

Departures from the paper's inference, off by default (the paper has them as an analysis, section 4.2 "Decoder"):

- `detect(nms=0.7)`: non-maximum suppression within each class. It improves the first decoder layer, in which several
  queries predict one object; it does not improve the last layer.
- `detect(merge=True)`: the detections of all decoder layers together, which need NMS.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from detr.geometry import Size
from detr.variant import Outputs, SigmoidOutputs

_MAX_DETECTIONS = 100  # per image; COCO's evaluation uses no more


@dataclass(frozen=True, eq=False)
class Detection:
    """Detections of one image: one entry per query, in the order of the queries.

    With NMS, and from models with a sigmoid per class, D <= 100 entries instead of Q, the highest score first.

    scores: float32 [Q], 0 to 1. labels: int64 [Q]. boxes_xyxy: float32 [Q, 4] in pixels of the original image; they can
    extend beyond its edges. masks: bool [Q, H, W] over the original image, or None.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor
    masks: Tensor | None = None


def detect(
    outputs: Outputs | SigmoidOutputs,
    original_sizes: Sequence[Size] | Tensor,
    *,
    sizes: Sequence[Size] | None = None,
    canvas: Size | None = None,
    nms: float | None = None,
    merge: bool = False,
) -> list[Detection]:
    """Return one `Detection` per image; `original_sizes` are (height, width) in pixels, [B, 2].

    sizes: (height, width) of the images on their canvas, without padding (`Batch.sizes`). Masks are returned only if
    `sizes` is given and the model predicts them; with `merge` there are none, since only the last layer predicts them.
    canvas: (height, width) of the padded images; None takes the largest height and width of `sizes`, which is the same
    unless the canvas was made larger than its images.
    nms: IoU threshold of NMS, above 0, at most 1 (0.7 in the paper); at most 100 detections per image are kept. None
    keeps every query. merge: use the queries of all decoder layers, also those of `outputs.auxiliary`.
    Raise `ValueError` for sizes that are not one per image, a threshold out of range, or `merge` without `nms`.
    """
    if nms is not None and not 0 < nms <= 1:
        raise ValueError(f"nms: got {nms}, expected an IoU above 0, at most 1, or None")
    if merge:
        if nms is None:
            raise ValueError(
                "merge: got nms=None, expected an IoU, since the layers find the same objects; use nms=0.7"
            )
        outputs = _all_layers(outputs)
    originals = torch.as_tensor(original_sizes, dtype=torch.float32).reshape(-1, 2).to(outputs.boxes.device)
    for name, given in (("original_sizes", originals), ("sizes", sizes)):
        if given is not None and len(given) != len(outputs.boxes):
            raise ValueError(f"{name}: got {len(given)}, expected one per image, {len(outputs.boxes)}")
    predicted = outputs.boxes.float()
    if isinstance(outputs, SigmoidOutputs):
        scores, labels, predicted = _best_pairs(outputs.logits.float(), predicted)
    else:
        scores, labels = outputs.logits.float().softmax(-1)[..., :-1].max(-1)
    centres, extents = predicted.chunk(2, dim=-1)
    boxes = torch.cat([centres - extents / 2, centres + extents / 2], dim=-1) * originals.flip(-1).repeat(1, 2)[:, None]
    masks: Sequence[Tensor | None] = [None] * len(boxes)
    if outputs.masks is not None and sizes is not None:
        masks = _masks(outputs.masks, [(int(h), int(w)) for h, w in original_sizes], sizes, canvas)
    detections = [Detection(*fields) for fields in zip(scores, labels, boxes, masks, strict=True)]
    return detections if nms is None else [_suppress(detection, nms) for detection in detections]


def detecting_queries(outputs: Outputs | SigmoidOutputs) -> Tensor:
    """Return the query [B, D] of each entry of `detect` without NMS, in its order."""
    batch, queries, classes = outputs.logits.shape
    if not isinstance(outputs, SigmoidOutputs):
        return torch.arange(queries, device=outputs.logits.device).expand(batch, -1)
    pairs = outputs.logits.float().flatten(1)
    return pairs.topk(min(_MAX_DETECTIONS, pairs.shape[1]), 1).indices // classes


def _best_pairs(logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores [B, D], labels [B, D] and boxes [B, D, 4] of the D <= 100 best pairs of a query and a class."""
    pairs = logits.flatten(1)
    best, places = pairs.topk(min(_MAX_DETECTIONS, pairs.shape[1]), 1)
    queries = places // logits.shape[-1]
    return best.sigmoid(), places % logits.shape[-1], boxes.gather(1, queries[..., None].expand(-1, -1, 4))


def _masks(logits: Tensor, originals: Sequence[Size], sizes: Sequence[Size], canvas: Size | None) -> list[Tensor]:
    """Return one bool [Q, H, W] per image at its original size, true where the mask's probability is above 0.5.

    As in the original: bilinear resize to the canvas, cut to the image, nearest-neighbour resize to the original size.
    It is done image by image, since 100 masks of one image of 800 x 1333 pixels are 430 MB.
    """
    if canvas is None:
        canvas = (max((h for h, _ in sizes), default=1), max((w for _, w in sizes), default=1))
    masks = []
    for of_image, (height, width), original in zip(logits, sizes, originals, strict=True):
        # A probability above 0.5 is a logit above 0.
        inside = F.interpolate(of_image[None].float(), canvas, mode="bilinear")[..., :height, :width] > 0
        masks.append(F.interpolate(inside.byte(), original)[0].bool())
    return masks


def _all_layers(outputs: Outputs | SigmoidOutputs) -> Outputs | SigmoidOutputs:
    """Return the queries of all layers as one: logits [B, layers * Q, classes], boxes [B, layers * Q, 4]."""
    layers = (*outputs.auxiliary, outputs)
    logits, boxes = (torch.cat(tensors, 1) for tensors in zip(*(layer[:2] for layer in layers), strict=True))
    return outputs.__class__(logits, boxes)


def _suppress(detection: Detection, threshold: float) -> Detection:
    from torchvision.ops import batched_nms  # takes seconds to import, and most calls of `detect` do not need it

    # torchvision separates classes by shifting their boxes by multiples of the largest coordinate. That is only enough
    # for coordinates of at least 0, and boxes can extend beyond the image. Double precision keeps the shifts exact.
    boxes = detection.boxes_xyxy.double()
    boxes = boxes - boxes.min() if len(boxes) else boxes
    kept = batched_nms(boxes, detection.scores.double(), detection.labels, threshold)[:_MAX_DETECTIONS]
    masks = None if detection.masks is None else detection.masks[kept]
    return Detection(detection.scores[kept], detection.labels[kept], detection.boxes_xyxy[kept], masks)
