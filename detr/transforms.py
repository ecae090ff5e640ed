"""The pixels of the augmentation: an image, its boxes and masks under a geometry (`detr/geometry.py`)."""

from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from detr.geometry import Geometry, Size


@overload
def apply(
    image: NDArray[np.uint8], boxes_xyxy: NDArray[Any], labels: NDArray[Any], geometry: Geometry, masks: None = None
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def apply(
    image: NDArray[np.uint8],
    boxes_xyxy: NDArray[Any],
    labels: NDArray[Any],
    geometry: Geometry,
    masks: NDArray[np.bool_],
) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...
def apply(
    image: NDArray[np.uint8],
    boxes_xyxy: NDArray[Any],
    labels: NDArray[Any],
    geometry: Geometry,
    masks: NDArray[np.bool_] | None = None,
) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply a geometry to an image, its boxes and, if they are given, its masks.

    image: uint8 [H, W, 3]. boxes_xyxy: [N, 4] pixels of that image, clamped to it here. labels: [N]. masks: bool
    [N, H, W].
    Returns the image as uint8 [3, h, w], boxes as float32 [M, 4] (cxcywh, fractions of the new image) and labels as
    int64 [M]; with masks also those, bool [M, h, w]. Boxes without area, in the image or in its crop, are dropped with
    their labels and masks, so M <= N; a mask that is left may be empty. Crowds are the caller's to drop.
    """
    height, width, _ = image.shape
    boxes, kept = _inside(np.asarray(boxes_xyxy, np.float32).reshape(-1, 4), (height, width))
    which = kept.nonzero()[0]
    # With its batch dimension from the start, so that torch sees the layout: on [1, H, W, 3] seen as [1, 3, H, W] its
    # resize is twice as fast as on the same bytes seen as [3, H, W].
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
    # Fractions do not change with the last resize, so it is left out of the boxes.
    fractions = torch.from_numpy(_scale(boxes, (height, width), (1, 1)))
    low, high = fractions[:, :2], fractions[:, 2:]
    placed = torch.cat([(low + high) / 2, high - low], dim=1)
    kept_labels = torch.from_numpy(np.asarray(labels, np.int64)[which])
    if masks is None:
        return pixels, placed, kept_labels
    return pixels, placed, kept_labels, _apply_to_masks(masks, which, geometry)


def _apply_to_masks(masks: NDArray[np.bool_], which: NDArray[np.int64], geometry: Geometry) -> Tensor:
    """Return the masks `which` under the geometry; resizes take the nearest pixel, as in the original.

    Every step picks rows and columns, so together they are one choice of rows and one of columns.
    """
    rows, columns = torch.arange(masks.shape[1]), torch.arange(masks.shape[2])
    if geometry.flip:
        columns = columns.flip(0)
    if (crop := geometry.crop) is not None:
        rows = _nearest(rows, crop.resized[0])[crop.top : crop.top + crop.size[0]]
        columns = _nearest(columns, crop.resized[1])[crop.left : crop.left + crop.size[1]]
    rows, columns = _nearest(rows, geometry.size[0]), _nearest(columns, geometry.size[1])
    # Only the masks that are left are copied; indexing keeps a read-only array from being shared.
    return torch.from_numpy(masks[which]).index_select(1, rows).index_select(2, columns)


def _nearest(places: Tensor, length: int) -> Tensor:
    """Resize a list of places. In float32, which holds each exactly and rounds between them as the original does."""
    return F.interpolate(places[None, None].float(), length)[0, 0].long()


def _resize(pixels: Tensor, size: Size) -> Tensor:
    # torch's antialiased bilinear kernel on uint8 stays within 2 levels of PIL and is 3x faster than through float.
    if pixels.shape[2:] == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def _inside(boxes: NDArray[np.float32], size: Size) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Clamp xyxy boxes to (height, width); return those with area left, and which of the given ones they are."""
    boxes = boxes.clip(0, np.array([size[1], size[0]] * 2, np.float32))
    kept: NDArray[np.bool_] = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    return boxes[kept], kept


def _scale(boxes: NDArray[np.float32], before: Size, after: Size) -> NDArray[np.float32]:
    return boxes * np.array([after[1] / before[1], after[0] / before[0]] * 2, np.float32)
