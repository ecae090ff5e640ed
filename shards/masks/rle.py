"""Codec between masks and COCO's run lengths."""

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shards.masks.parse import parse_segmentation

Masks = npt.NDArray[np.bool_]
Runs = dict[str, Any]


def encode_masks(masks: Masks) -> npt.NDArray[np.object_]:
    """Return the counts of the masks' runs, bytes [N], as `Detections.masks` holds them.

    masks: bool [N, height, width] in any memory layout; [N, width, height] transposed avoids a copy.
    """
    from pycocotools import mask

    counts = np.empty(len(masks), np.object_)
    if len(masks):
        columns = np.asfortranarray(masks.transpose(1, 2, 0)).view(np.uint8)
        counts[:] = [runs["counts"] for runs in mask.encode(columns)]
    return counts


def decode_masks(runs: Sequence[Runs], height: int, width: int) -> Masks:
    """Return the masks of `runs` of images of that size, bool [N, height, width]."""
    from pycocotools import mask

    masks = np.zeros((len(runs), height, width), np.bool_)
    if runs:
        columns = mask.decode(list(runs)).view(np.bool_)
        boxes = mask.toBbox(list(runs)).astype(int).tolist()
        # Only the boxes, because copying from column-major to row-major order is slow.
        for number, (x, y, box_width, box_height) in enumerate(boxes):
            region = np.s_[y : y + box_height, x : x + box_width]
            masks[number][region] = columns[..., number][region]
    return masks


def to_runs(raw: msgspec.Raw, height: int, width: int) -> Runs:
    """Return the runs of a segmentation given as JSON; raise `FormError` if it cannot be used."""
    from pycocotools import mask

    shape = parse_segmentation(raw, height, width)
    if isinstance(shape[0], int):
        runs: Runs = mask.frPyObjects({"size": [height, width], "counts": shape}, height, width)
        return runs
    merged: Runs = mask.merge(mask.frPyObjects(shape, height, width))
    return merged
