"""Augmentation of pixels, boxes and masks by a `Geometry`."""

from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from detr.geometry import Geometry, Size


@overload
def apply(
    image: NDArray[np.uint8],
    boxes_xyxy: NDArray[Any],
    labels: NDArray[Any],
    geometry: Geometry,
    masks: None = None,
    flat_boxes: bool = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def apply(
    image: NDArray[np.uint8],
    boxes_xyxy: NDArray[Any],
    labels: NDArray[Any],
    geometry: Geometry,
    masks: NDArray[np.bool_],
    flat_boxes: bool = ...,
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def apply(
    image: NDArray[np.uint8],
    boxes_xyxy: NDArray[Any],
    labels: NDArray[Any],
    geometry: Geometry,
    masks: NDArray[np.bool_] | None = None,
    flat_boxes: bool = False,
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an image, its boxes, its labels and, if they are given, its masks after the steps of a geometry.

    image: uint8 [H, W, 3]. boxes_xyxy: [N, 4] in pixels of that image, to which they are clamped. labels: [N].
    masks: bool [N, H, W].
    The results are an image uint8 [3, h, w], boxes float32 [M, 4] (cxcywh, fractions of the new image), labels int64 [M]
    and masks bool [M, h, w]. Boxes without area, in the image or in its crop, are dropped with their labels and masks,
    so M <= N; a remaining mask may be empty. The caller drops crowd regions. `flat_boxes`: boxes without area in the
    image stay, unless it is cropped.
    """
    height, width, _ = image.shape
    boxes, kept = _inside(np.asarray(boxes_xyxy, np.float32).reshape(-1, 4), (height, width), flat_boxes)
    which = kept.nonzero()[0]
    # With a batch dimension, torch recognises the channels-last layout: its resize of [1, 3, H, W] is twice as fast as
    # of the same bytes as [3, H, W].
    pixels = torch.from_numpy(image if image.flags.writeable else image.copy())[None].permute(0, 3, 1, 2)
    if geometry.flip:
        pixels = pixels.flip(-1)
        x1, y1, x2, y2 = boxes.T
        boxes = np.stack([width - x2, y1, width - x1, y2], axis=1)
    if (crop := geometry.crop) is not None:
        h, w = crop.size
        pixels = _resize(pixels, crop.resized)[..., crop.top : crop.top + h, crop.left : crop.left + w]
        boxes = _scale(boxes, (height, width), crop.resized)
        boxes, kept = _inside(boxes - np.array([crop.left, crop.top] * 2, np.float32), crop.size)
        which, (height, width) = which[kept], crop.size
    pixels = _resize(pixels, geometry.size)[0]
    # The last resize is not applied to the boxes, since it does not change fractions.
    fractions = torch.from_numpy(_scale(boxes, (height, width), (1, 1)))
    low, high = fractions[:, :2], fractions[:, 2:]
    cxcywh = torch.cat([(low + high) / 2, high - low], dim=1)
    kept_labels = torch.from_numpy(np.asarray(labels, np.int64)[which])
    if masks is None:
        return pixels, cxcywh, kept_labels
    return pixels, cxcywh, kept_labels, _apply_to_masks(masks, which, geometry)


def _apply_to_masks(masks: NDArray[np.bool_], which: NDArray[np.int64], geometry: Geometry) -> Tensor:
    """Return the masks `which` after the steps of the geometry, with nearest-neighbour resizes as in the original.

    Every step selects rows and columns, so all steps together are one selection of rows and one of columns.
    """
    rows, columns = torch.arange(masks.shape[1]), torch.arange(masks.shape[2])
    if geometry.flip:
        columns = columns.flip(0)
    if (crop := geometry.crop) is not None:
        rows = _nearest(rows, crop.resized[0])[crop.top : crop.top + crop.size[0]]
        columns = _nearest(columns, crop.resized[1])[crop.left : crop.left + crop.size[1]]
    rows, columns = _nearest(rows, geometry.size[0]), _nearest(columns, geometry.size[1])
    # Indexing copies the remaining masks only, and never shares memory with a read-only array.
    return torch.from_numpy(masks[which]).index_select(1, rows).index_select(2, columns)


def _nearest(indices: Tensor, length: int) -> Tensor:
    """Return a list of indices resized to `length`; float32 represents indices exactly and rounds as in the original."""
    return F.interpolate(indices[None, None].float(), length)[0, 0].long()


def _resize(pixels: Tensor, size: Size) -> Tensor:
    # torch's antialiased bilinear kernel for uint8 is within 2 levels of PIL and 3 times as fast as the one for float.
    if pixels.shape[2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def _inside(
    boxes: NDArray[np.float32], size: Size, flat: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the xyxy boxes clamped to (height, width) that have an area, and a bool per given box, true if kept.

    `flat`: keep those without area too.
    """
    boxes = boxes.clip(0, np.array([size[1], size[0]] * 2, np.float32))
    kept: NDArray[np.bool_] = np.all(boxes[:, 2:] > boxes[:, :2], axis=1) | flat
    return boxes[kept], kept


def _scale(boxes: NDArray[np.float32], before: Size, after: Size) -> NDArray[np.float32]:
    return boxes * np.array([after[1] / before[1], after[0] / before[0]] * 2, np.float32)
