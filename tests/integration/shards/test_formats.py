"""Real COCO images as Pascal VOC, as YOLO labels and as foreign tars: the same boxes come back."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image

from shards.config import IndexConfig, VocConfig, WriteConfig, YoloConfig
from shards.dataset.manifest import Manifest
from shards.dataset.verify import verify
from shards.foreign.index_tars import index_tars
from shards.formats.document import Document, write_document
from shards.formats.voc import voc_document
from shards.formats.yolo import yolo_document
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader, read_samples
from shards.write.writer import write_coco
from tests.support.real_data import COCO_TINY

pytestmark = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)
IMAGES = COCO_TINY / "val2017"


class Truth:
    """The validation images: names of categories, and boxes by image id."""

    def __init__(self) -> None:
        self.data = json.loads((COCO_TINY / "annotations" / "instances_val2017.json").read_bytes())
        self.names = {category["id"]: category["name"] for category in self.data["categories"]}
        self.boxes: dict[int, list[tuple[str, list[float]]]] = {image["id"]: [] for image in self.data["images"]}
        for annotation in self.data["annotations"]:
            self.boxes[annotation["image_id"]].append((self.names[annotation["category_id"]], annotation["bbox"]))


@pytest.fixture(scope="module")
def truth() -> Truth:
    return Truth()


def link(folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in IMAGES.iterdir():
        os.link(path, folder / path.name) if path.stat().st_dev == folder.stat().st_dev else shutil.copy(path, folder)


def boxes_of(manifest: Manifest) -> dict[int, list[tuple[str, list[float]]]]:
    index = manifest.index()
    return {
        int(record["image_id"]): [
            (manifest.categories[annotation["label"]].name, annotation["bbox"].tolist())
            for annotation in index.annotations_of(row)
        ]
        for row, record in enumerate(index.images)
    }


def check(document: Document, out: Path, truth: Truth, pixels: float) -> Manifest:
    """Write the data set and check that all boxes and their order are the truth's."""
    manifest = write_document(document, out, WriteConfig(samples_per_shard=32))
    found = boxes_of(manifest)
    assert found.keys() == truth.boxes.keys()
    for image_id, expected in truth.boxes.items():
        assert [name for name, _ in found[image_id]] == [name for name, _ in expected]
        got = np.array([box for _, box in found[image_id]]).reshape(-1, 4)
        want = np.array([box for _, box in expected]).reshape(-1, 4)
        np.testing.assert_allclose(got[:, :2], want[:, :2], atol=pixels)
        np.testing.assert_allclose(got[:, :2] + got[:, 2:], want[:, :2] + want[:, 2:], atol=pixels)
    assert verify(out).ok
    return manifest


def test_boxes_from_pascal_voc_equal_the_truth_within_half_a_pixel(truth: Truth, tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit" / "VOC2017"
    link(root / "JPEGImages")
    (root / "Annotations").mkdir()
    for image in truth.data["images"]:
        objects = "".join(
            f"<object><name>{escape(name)}</name><difficult>0</difficult><bndbox><xmin>{round(x) + 1}</xmin>"
            f"<ymin>{round(y) + 1}</ymin><xmax>{round(x + w)}</xmax><ymax>{round(y + h)}</ymax></bndbox></object>"
            for name, (x, y, w, h) in truth.boxes[image["id"]]
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
        path = root / "Annotations" / f"{Path(image['file_name']).stem}.xml"
        path.write_text(f"<annotation>{size}{objects}</annotation>")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "ImageSets" / "Main" / "val.txt").write_text(
        "\n".join(Path(image["file_name"]).stem for image in truth.data["images"])
    )
    document = voc_document(tmp_path, VocConfig("val", workers=2))
    manifest = check(document, tmp_path / "out", truth, 0.5 + 1e-9)
    used = Counter(name for boxes in truth.boxes.values() for name, _ in boxes)
    assert [category.name for category in manifest.categories] == sorted(used)


def test_boxes_from_yolo_labels_equal_the_truth_within_rounding(truth: Truth, tmp_path: Path) -> None:
    link(tmp_path / "images" / "val")
    (tmp_path / "labels" / "val").mkdir(parents=True)
    numbers = {name: number for number, name in enumerate(truth.names.values())}
    for image in truth.data["images"]:
        boxes, width, height = truth.boxes[image["id"]], image["width"], image["height"]
        lines = [
            f"{numbers[name]} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}\n"
            for name, (x, y, w, h) in boxes
        ]
        if lines:
            (tmp_path / "labels" / "val" / f"{Path(image['file_name']).stem}.txt").write_text("".join(lines))
    listed = "".join(f"  {number}: {name}\n" for name, number in numbers.items())
    (tmp_path / "data.yaml").write_text(f"path: ../datasets\ntrain: images/train\nval: images/val\nnames:\n{listed}")
    document = yolo_document(tmp_path, YoloConfig("val", workers=2))
    manifest = check(document, tmp_path / "out", truth, 1e-3)
    assert [(category.id, category.name) for category in manifest.categories] == list(enumerate(truth.names.values()))


@pytest.fixture
def stock(truth: Truth, tmp_path: Path) -> Path:
    """Return a folder of tars from webdataset's own writer, with keys that are not ids."""
    from webdataset.writer import TarWriter

    annotations: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth.data["images"]}
    for annotation in truth.data["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    (tmp_path / "tars").mkdir()
    for number in range(2):
        with TarWriter(str(tmp_path / "tars" / f"street-{number}.tar")) as tar:
            for image in truth.data["images"][number::2]:
                sample = {
                    "__key__": f"street/{Path(image['file_name']).stem}-left",
                    "jpg": (IMAGES / image["file_name"]).read_bytes(),
                    "json": {"image_id": image["id"], "objects": annotations[image["id"]]},
                    "txt": "a street",
                }
                tar.write(sample)
    return tmp_path / "tars"


def test_tars_of_webdatasets_writer_are_indexed_verified_and_read(truth: Truth, stock: Path, tmp_path: Path) -> None:
    categories = COCO_TINY / "annotations" / "instances_train2017.json"
    before = {path.name: path.read_bytes() for path in stock.iterdir()}
    manifest = index_tars(stock, IndexConfig(categories))
    assert {path.name: path.read_bytes() for path in stock.glob("*.tar")} == before
    assert manifest.name == "tars"  # not the name of the file of another data set
    assert verify(stock).ok
    assert boxes_of(manifest) == truth.boxes
    ours = write_coco(IMAGES, COCO_TINY / "annotations" / "instances_val2017.json", tmp_path / "ours")
    fields = ["annotation_id", "bbox", "area", "label", "iscrowd"]
    for row, image_id in enumerate(manifest.index().images["image_id"]):
        expected = ours.index().annotations_of(int(ours.index().rows_of(image_id)))
        found = manifest.index().annotations_of(row)
        assert all(np.array_equal(found[field], expected[field]) for field in fields)
    plan = plan_epoch(manifest, seed=3, epoch=0, batch_size=8)
    names = {image["id"]: image["file_name"] for image in truth.data["images"]}
    seen = Counter[int]()
    for sample in read_samples(manifest, range(0, manifest.images, 9)):
        with Image.open(IMAGES / names[sample.image_id]) as image:
            assert np.abs(sample.image.astype(int) - np.asarray(image.convert("RGB")).astype(int)).max() <= 2
    for batch in open_loader(manifest, plan, transform=lambda sample: sample.image_id, collate=list):
        seen.update(batch)
    assert seen.keys() == names.keys()


def test_tars_of_this_projects_writer_get_their_digest_back(tmp_path: Path) -> None:
    annotations = COCO_TINY / "annotations" / "instances_train2017.json"
    manifest = write_coco(COCO_TINY / "train2017", annotations, tmp_path / "out", WriteConfig(samples_per_shard=50))
    index = {path.name: path.read_bytes() for path in (tmp_path / "out" / "index").iterdir()}
    shutil.rmtree(tmp_path / "out" / "index")
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "source.json").unlink()
    again = index_tars(tmp_path / "out", IndexConfig(annotations, workers=2))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "index").iterdir()} == index
    assert again.digest == manifest.digest
