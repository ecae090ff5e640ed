"""From predictions to detections in pixels: the best class of every query, no suppression of duplicates.

Departures from the paper's inference, off by default (the paper has them as an analysis, section 4.2 "Decoder"):

- `detect(nms=0.7)`: duplicates of one class are suppressed. The first decoder layer cannot tell which of several
  queries shall have an object and gains from it; the last one can, and gains nothing.
- `detect(merge=True)`: the detections of all decoder layers together; they need suppression.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from detr.model import Outputs

Size = tuple[int, int]
_MOST_DETECTIONS = 100  # per image; COCO's evaluation looks at no more


@dataclass(frozen=True, eq=False)
class Detection:
    """What was found in one image: one entry per query, in the order of the queries.

    With suppression of duplicates, D <= 100 entries instead of Q, the best first.

    scores: float32 [Q], 0 to 1. labels: int64 [Q]. boxes_xyxy: float32 [Q, 4] in pixels of the original image; they can
    reach past its edges. masks: bool [Q, H, W] over the original image, or None.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor
    masks: Tensor | None = None


def detect(
    outputs: Outputs,
    original_sizes: Sequence[Size] | Tensor,
    *,
    sizes: Sequence[Size] | None = None,
    canvas: Size | None = None,
    nms: float | None = None,
    merge: bool = False,
) -> list[Detection]:
    """Return one Detection per image; `original_sizes` are (height, width) in pixels, [B, 2].

    sizes: those of the images on their canvas, without padding (`Batch.sizes`). Only if they are given, the masks of a
    model that has them are made; a merge has none, since only the last layer predicts them.
    canvas: (height, width) of the padded images; None takes the largest height and width of `sizes`, which is the same
    unless the canvas was made larger than its images.
    nms: of detections of one class whose IoU is above this, only the best is kept (the paper: 0.7), and of an image's
    the 100 best; None keeps every query. merge: start from the queries of all decoder layers instead of the last's;
    those before it are `outputs.auxiliary`. Raises ValueError for a merge without `nms`, which would be duplicates.
    """
    if nms is not None and not 0 < nms <= 1:
        raise ValueError(f"nms: got {nms}, expected an IoU above 0, at most 1, or None")
    if merge:
        if nms is None:
            raise ValueError("merge: got nms=None, expected an IoU: the layers find the same objects; use nms=0.7")
        outputs = _all_layers(outputs)
    originals = torch.as_tensor(original_sizes, dtype=torch.float32).reshape(-1, 2).to(outputs.boxes.device)
    for name, given in (("original_sizes", originals), ("sizes", sizes)):
        if given is not None and len(given) != len(outputs.boxes):
            raise ValueError(f"{name}: got {len(given)}, expected one per image, {len(outputs.boxes)}")
    scores, labels = outputs.logits.float().softmax(-1)[..., :-1].max(-1)
    centres, extents = outputs.boxes.float().chunk(2, dim=-1)
    boxes = torch.cat([centres - extents / 2, centres + extents / 2], dim=-1) * originals.flip(-1).repeat(1, 2)[:, None]
    masks: Sequence[Tensor | None] = [None] * len(boxes)
    if outputs.masks is not None and sizes is not None:
        masks = _masks(outputs.masks, [(int(h), int(w)) for h, w in original_sizes], sizes, canvas)
    found = [Detection(*parts) for parts in zip(scores, labels, boxes, masks, strict=True)]
    return found if nms is None else [_without_duplicates(detection, nms) for detection in found]


def _masks(logits: Tensor, originals: Sequence[Size], sizes: Sequence[Size], canvas: Size | None) -> list[Tensor]:
    """Return where each query's probability is above 0.5, bool [Q, H, W] per image at its original size.

    As in the original: bilinear to the canvas, cut to the image, nearest to the original size. Image by image, since
    100 masks of one image of 800 x 1333 pixels are 430 MB.
    """
    if canvas is None:
        canvas = (max((h for h, _ in sizes), default=1), max((w for _, w in sizes), default=1))
    masks = []
    for of_image, (height, width), original in zip(logits, sizes, originals, strict=True):
        # A probability above 0.5 is a logit above 0.
        inside = F.interpolate(of_image[None].float(), canvas, mode="bilinear")[..., :height, :width] > 0
        masks.append(F.interpolate(inside.byte(), original)[0].bool())
    return masks


def _all_layers(outputs: Outputs) -> Outputs:
    """The queries of all layers side by side: logits [B, layers * Q, K + 1], boxes [B, layers * Q, 4]."""
    layers = (*outputs.auxiliary, outputs)
    return Outputs(torch.cat([layer.logits for layer in layers], 1), torch.cat([layer.boxes for layer in layers], 1))


def _without_duplicates(detection: Detection, threshold: float) -> Detection:
    from torchvision.ops import batched_nms  # seconds to import, and most calls of `detect` do without

    # torchvision separates classes by shifting their boxes apart by the largest coordinate. Boxes that start at 0 make
    # that enough (they can reach past the image's edges), and double precision keeps it exact.
    boxes = detection.boxes_xyxy.double()
    boxes = boxes - boxes.min() if len(boxes) else boxes
    kept = batched_nms(boxes, detection.scores.double(), detection.labels, threshold)[:_MOST_DETECTIONS]
    masks = None if detection.masks is None else detection.masks[kept]
    return Detection(detection.scores[kept], detection.labels[kept], detection.boxes_xyxy[kept], masks)
