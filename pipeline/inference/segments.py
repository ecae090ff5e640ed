"""Panoptic segments of a picture: COCO's panoptic PNG and JSON, and run lengths.

Needs only what a served version lists as its requirements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from detr.panoptic import PanopticResult
from shards.dataset.categories import Category
from shards.masks.rle import encode_masks
from shards.panoptic.segment_png import write_png
from shards.panoptic.segments import find_regions


@dataclass(frozen=True, eq=False)
class Segmented:
    """Picture in segments: each pixel belongs to one of them, or to none if nothing was found.

    indices: int32 [height, width], position in `labels`, -1 for none. In files the id of a segment is its position + 1, so
    that 0 stays VOID.
    infos: `segments_info` of COCO's panoptic JSON, with the score of each.
    """

    indices: npt.NDArray[np.int32]
    labels: tuple[int, ...]
    infos: tuple[dict[str, Any], ...]

    def png(self) -> bytes:
        """Return COCO's panoptic PNG."""
        return write_png(self.indices + 1)

    def with_run_lengths(self, categories: Sequence[Category]) -> list[dict[str, Any]]:
        """Return each segment with the name of its category and its pixels in COCO's run lengths."""
        masks = self.indices[None] == np.arange(len(self.labels))[:, None, None]
        size = list(self.indices.shape)
        return [
            {**info, "category": categories[label].name, "segmentation": {"size": size, "counts": counts.decode()}}
            for info, label, counts in zip(self.infos, self.labels, encode_masks(masks), strict=True)
        ]


def segmented(result: PanopticResult, categories: Sequence[Category]) -> Segmented:
    """Return the segments of a result with the ids, boxes and areas that COCO's format has."""
    indices = result.indices.numpy()
    regions = find_regions((indices + 1).astype(np.uint32))
    boxes = {
        int(number): [int(left), int(top), int(right - left + 1), int(bottom - top + 1)]
        for number, (left, top, right, bottom) in zip(regions.ids, regions.corners, strict=True)
    }
    infos = tuple(
        {
            "id": number,
            "category_id": categories[segment.label].id,
            "isthing": int(bool(categories[segment.label].isthing)),
            "iscrowd": 0,
            "area": segment.area,
            "bbox": boxes[number],
            "score": segment.score,
        }
        for number, segment in enumerate(result.segments, start=1)
    )
    return Segmented(indices, tuple(segment.label for segment in result.segments), infos)


def panoptic_document(pictures: Sequence[dict[str, Any]], categories: Sequence[Category]) -> dict[str, Any]:
    """Return COCO's panoptic JSON: `pictures` are its annotations, each with the picture's size and file."""
    return {
        "images": [
            {"id": p["image_id"], "file_name": p["picture"], "height": p["height"], "width": p["width"]}
            for p in pictures
        ],
        "annotations": [{name: p[name] for name in ("image_id", "file_name", "segments_info")} for p in pictures],
        "categories": [
            {"id": category.id, "name": category.name, "isthing": int(bool(category.isthing))}
            | ({"color": list(category.color)} if category.color else {})
            for category in categories
        ],
    }
