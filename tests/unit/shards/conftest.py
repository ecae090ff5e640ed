"""Fixtures: a small COCO data set with all features of the real one, a store of files, and foreign tars."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.config import WriteConfig
from shards.dataset.manifest import Manifest
from shards.store import storage
from shards.store.download import Item
from shards.write.writer import write_coco
from tests.support.foreign_tars import picture, tar, thing
from tests.support.source_files import SourceFiles


class Coco(SourceFiles):
    JSON = "instances.json"

    def write(self, out: str = "out", **config: Any) -> Manifest:
        return write_coco(self.images, self.save(), self.root / out, WriteConfig(**config))


def annotation(number: int, image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3] * 0.75,
        "iscrowd": 0,
        "segmentation": [[1.5, 2, 3.25, 4, 5, 6]],
    } | more


@pytest.fixture
def coco(tmp_path: Path) -> Coco:
    """Make a source of 7 images (RGB, grey, CMYK JPEGs, a PNG; one without annotations), 3 categories and a crowd."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    images = []
    kinds = [
        ("RGB", "jpg"),
        ("L", "jpg"),
        ("CMYK", "jpg"),
        ("RGB", "png"),
        ("RGB", "jpg"),
        ("RGB", "jpg"),
        ("RGB", "jpg"),
    ]
    for number, (mode, ending) in enumerate(kinds):
        width, height = 40 + 3 * number, 64 - 5 * number
        name = f"picture {number}.{ending}"
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).convert(mode).save(tmp_path / "images" / name)
        images.append({"id": 100 + 7 * number, "file_name": name, "width": width, "height": height, "license": number})
    annotations = [
        annotation(11, 100, 90, [1.5, 2.25, 20.1, 30.7], attributes={"truncated": True}),
        annotation(12, 107, 3, [0, 0, 10, 10]),
        annotation(13, 100, 3, [5, 5, 12.5, 0]),
        annotation(14, 100, 7, [0, 0, 40, 60], iscrowd=1, segmentation={"counts": [5, 10, 2545], "size": [64, 40]}),
        annotation(15, 114, 7, [-0.5, 3, 45.25, 8]),
        annotation(16, 128, 90, [3, 3, 30, 20]),
        annotation(17, 135, 7, [2, 2, 9, 9]),
        annotation(18, 142, 7, [10, 10, 15, 15]),
        annotation(19, 142, 7, [12, 10, 15, 15]),
    ]
    categories = [
        {"id": 90, "name": "toothbrush", "supercategory": "indoor"},
        {"id": 3, "name": "car", "supercategory": "vehicle"},
        {"id": 7, "name": "train", "supercategory": "vehicle"},
    ]
    data = {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}
    return Coco(tmp_path, data)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Record the (file, offset) of every range that is requested from the store, in order."""
    requests: list[tuple[str, int]] = []
    read = storage.read_range

    def record_and_read(url: str, offset: int, length: int) -> bytes:
        requests.append((url.rpartition("/")[2], offset))
        return read(url, offset, length)

    monkeypatch.setattr(storage, "read_range", record_and_read)
    return requests


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Item]:
    """Return a function that makes a file of random bytes in a simulated store and returns its item."""
    (tmp_path / "store").mkdir()

    def make(name: str, size: int = 1000) -> Item:
        content = np.random.default_rng(size).bytes(size)
        (tmp_path / "store" / name).write_bytes(content)
        return Item(str(tmp_path / "store" / name), size, hashlib.sha256(content).hexdigest())

    return make


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """Write a file that names the categories 3 and 7 of `tars`."""
    path = tmp_path / "names.json"
    path.write_text('{"categories": [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 7, "name": "dog"}]}')
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Write three samples in two tars, with words as keys and annotations in three forms."""
    folder = tmp_path / "tars"
    tar(
        folder / "b.tar",
        ("./deep/three.json", []),
        ("./deep/three.img.png", picture(20, 10, "PNG")),
    )
    tar(
        folder / "a.tar",
        ("one.jpg", picture()),
        ("one.json", {"image": {"id": 5, "width": 40, "height": 30}, "annotations": [thing(1, 2, 3, 4, id=8, area=9)]}),
        ("two.cls", b"7"),
        ("two.jpeg", picture(30, 30)),
        ("two.json", {"objects": [thing(5, 6, 7, 8, category_id=None, category="dog", iscrowd=1), thing(0, 0, 2, 2)]}),
        ("two.mask.png", picture()),
    )
    return folder
