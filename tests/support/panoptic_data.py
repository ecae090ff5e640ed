"""A small data set in COCO's panoptic format, to be damaged and written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.config import WriteConfig
from shards.dataset.manifest import Manifest
from shards.panoptic.segment_png import write_png
from shards.write.writer import write_panoptic
from tests.support.source_files import SourceFiles

PERSON, CAR, GRASS, SKY = 1, 3, 92, 200


class Panoptic(SourceFiles):
    """Images 7, 3 and 12 of 30x20 pixels, and their PNGs; the JSON is written by `write`.

    Image 7: sky 5, person 70000 in two pieces, a car 2**24 - 1 of one pixel, VOID. Image 3: grass 9, a crowd of persons
    300, a column 301 of a car. Image 12: sky 5 everywhere.
    """

    JSON = "panoptic.json"

    @property
    def segments(self) -> Path:
        return self.root / "segments"

    def annotation(self, image_id: int) -> dict[str, Any]:
        """Return the entry of an image in the JSON, to be changed."""
        return next(entry for entry in self.data["annotations"] if entry["image_id"] == image_id)

    def segment(self, image_id: int, number: int) -> dict[str, Any]:
        """Return the entry of a segment in the JSON, to be changed."""
        return next(entry for entry in self.annotation(image_id)["segments_info"] if entry["id"] == number)

    def png(self, image_id: int) -> Path:
        return self.segments / f"{image_id}.png"

    def write(self, out: str = "out", **config: Any) -> Manifest:
        return write_panoptic(self.images, self.save(), self.segments, self.root / out, WriteConfig(**config))


def maps() -> dict[int, NDArray[np.int64]]:
    """Return the segment ids of each image's pixels."""
    first, second, third = (np.zeros((20, 30), np.int64) for _ in range(3))
    first[:8] = 5
    first[10:14, 2:6], first[12:16, 20:25], first[18, 29] = 70000, 70000, 2**24 - 1
    second[:] = 9
    second[5:9, 5:15], second[3:17, 20] = 300, 301
    third[:] = 5
    return {7: first, 3: second, 12: third}


def make_panoptic(root: Path) -> Panoptic:
    """Make images and PNGs below `root`, and the content of their JSON."""
    categories = {7: {5: SKY, 70000: PERSON, 2**24 - 1: CAR}, 3: {9: GRASS, 300: PERSON, 301: CAR}, 12: {5: SKY}}
    (root / "images").mkdir(parents=True)
    (root / "segments").mkdir()
    images, annotations = [], []
    for image_id, ids in maps().items():
        height, width = ids.shape
        noise = np.random.default_rng(image_id).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(root / "images" / f"{image_id}.jpg")
        (root / "segments" / f"{image_id}.png").write_bytes(write_png(ids))
        images.append({"id": image_id, "file_name": f"{image_id}.jpg", "width": width, "height": height})
        listed = [_segment(ids, number, category) for number, category in categories[image_id].items()]
        annotations.append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": listed})
    annotations.reverse()  # images are paired by id, not by position
    data = {
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": SKY, "name": "sky", "isthing": 0, "supercategory": "sky", "color": [70, 130, 180]},
            {"id": PERSON, "name": "person", "isthing": 1, "supercategory": "person", "color": [220, 20, 60]},
            {"id": GRASS, "name": "grass", "isthing": 0, "supercategory": "ground", "color": [0, 200, 0]},
            {"id": CAR, "name": "car", "isthing": 1, "supercategory": "vehicle", "color": [0, 0, 142]},
        ],
    }
    return Panoptic(root, data)


def _segment(ids: NDArray[np.int64], number: int, category: int) -> dict[str, Any]:
    rows, columns = np.nonzero(ids == number)
    left, top = int(columns.min()), int(rows.min())
    box = [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1]
    return {
        "id": number,
        "category_id": category,
        "iscrowd": int(number == 300),
        "bbox": box,
        "area": len(rows),
        "note": "kept",
    }
