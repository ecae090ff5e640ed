"""From predictions to detections in pixels: the best class of every query, no suppression of duplicates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detr.model import Outputs


@dataclass(frozen=True, eq=False)
class Detection:
    """What was found in one image, one entry per query, in the order of the queries.

    scores: float32 [Q], 0 to 1. labels: int64 [Q]. boxes_xyxy: float32 [Q, 4] in pixels of the original image; they can
    reach past its edges.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor


def detect(outputs: Outputs, original_sizes: Sequence[tuple[int, int]] | Tensor) -> list[Detection]:
    """Return one Detection per image; `original_sizes` are (height, width) in pixels, [B, 2]."""
    sizes = torch.as_tensor(original_sizes, dtype=torch.float32).reshape(-1, 2).to(outputs.boxes.device)
    if len(sizes) != len(outputs.boxes):
        raise ValueError(f"original_sizes: got {len(sizes)}, expected one per image, {len(outputs.boxes)}")
    scores, labels = outputs.logits.float().softmax(-1)[..., :-1].max(-1)
    centres, extents = outputs.boxes.float().chunk(2, dim=-1)
    boxes = torch.cat([centres - extents / 2, centres + extents / 2], dim=-1) * sizes.flip(-1).repeat(1, 2)[:, None]
    return [Detection(*parts) for parts in zip(scores, labels, boxes, strict=True)]
