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

from detr.model import Outputs

_MOST_DETECTIONS = 100  # per image; COCO's evaluation looks at no more


@dataclass(frozen=True, eq=False)
class Detection:
    """What was found in one image: one entry per query, in the order of the queries.

    With suppression of duplicates, D <= 100 entries instead of Q, the best first.

    scores: float32 [Q], 0 to 1. labels: int64 [Q]. boxes_xyxy: float32 [Q, 4] in pixels of the original image; they can
    reach past its edges.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor


def detect(
    outputs: Outputs,
    original_sizes: Sequence[tuple[int, int]] | Tensor,
    *,
    nms: float | None = None,
    merge: bool = False,
) -> list[Detection]:
    """Return one Detection per image; `original_sizes` are (height, width) in pixels, [B, 2].

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
    sizes = torch.as_tensor(original_sizes, dtype=torch.float32).reshape(-1, 2).to(outputs.boxes.device)
    if len(sizes) != len(outputs.boxes):
        raise ValueError(f"original_sizes: got {len(sizes)}, expected one per image, {len(outputs.boxes)}")
    scores, labels = outputs.logits.float().softmax(-1)[..., :-1].max(-1)
    centres, extents = outputs.boxes.float().chunk(2, dim=-1)
    boxes = torch.cat([centres - extents / 2, centres + extents / 2], dim=-1) * sizes.flip(-1).repeat(1, 2)[:, None]
    found = [Detection(*parts) for parts in zip(scores, labels, boxes, strict=True)]
    return found if nms is None else [_without_duplicates(detection, nms) for detection in found]


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
    return Detection(detection.scores[kept], detection.labels[kept], detection.boxes_xyxy[kept])
