"""Real COCO images with a dozen kinds of defects: the command names each and keeps the other images unchanged."""

import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs.cli import run
from shards.dataset.manifest import load_manifest
from shards.dataset.verify import verify
from tests.support.real_data import COCO_TINY

pytestmark = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)
Json = dict[str, Any]


class Sowing:
    """The validation images, with each kind of damage on an image of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = json.loads((COCO_TINY / "annotations" / "instances_val2017.json").read_bytes())
        self.original = json.loads(json.dumps(self.data))
        self.boxes: dict[int, list[Json]] = {}
        for annotation in self.data["annotations"]:
            self.boxes.setdefault(annotation["image_id"], []).append(annotation)
        with_two = [image for image in self.data["images"] if len(self.boxes.get(image["id"], [])) > 1]
        self.images = dict(zip(DAMAGES, with_two, strict=False))
        (root / "images").mkdir()
        for image in self.data["images"]:
            shutil.copy(COCO_TINY / "val2017" / image["file_name"], root / "images")
        for name, image in self.images.items():
            DAMAGES[name][1](self, image, root / "images" / image["file_name"])
        (root / "instances.json").write_text(json.dumps(self.data))

    def box(self, image: Json) -> Json:
        return self.boxes[image["id"]][0]

    def shard(self, *flags: str) -> int:
        words = ["--images", "images", "--annotations", "instances.json", "--out", "out", "--samples-per-shard", "16"]
        return run(["shard", "coco", *words, *flags])


def overwrite(sowing: Sowing, image: Json, path: Path) -> None:
    """Replace a few kilobytes, like a bad sector. No decoder notices every single changed byte."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + random.Random(0).randbytes(4096) + content[middle + 4096 :])


def png(sowing: Sowing, image: Json, path: Path) -> None:
    with Image.open(path) as opened:
        opened.save(path, format="PNG")


def box(**fields: object) -> Callable[[Sowing, Json, Path], None]:
    return lambda sowing, image, path: sowing.box(image).update(fields)


def image(**fields: object) -> Callable[[Sowing, Json, Path], None]:
    return lambda sowing, image, path: image.update(fields)


def twice(sowing: Sowing, image: Json, path: Path) -> None:
    sowing.data["images"].append(image | {"file_name": sowing.data["images"][0]["file_name"]})


def truncated(sowing: Sowing, image: Json, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


# Kind in the report, function that does the damage, and the loss in a quarantine: the image, a box, or nothing.
DAMAGES: dict[str, tuple[str, Callable[[Sowing, Json, Path], None], str]] = {
    "corrupt bytes": ("corrupt", overwrite, "image"),
    "truncated": ("truncated", truncated, "image"),
    "no image": ("not-an-image", lambda sowing, image, path: path.write_text("<html>gone</html>") and None, "image"),
    "another size": ("wrong-size", image(width=17), "image"),
    "missing": ("missing-file", lambda sowing, image, path: path.unlink(), "image"),
    "image id twice": ("duplicate-image-id", twice, "image"),
    "annotation id twice": (
        "duplicate-annotation-id",
        lambda sowing, image, path: sowing.box(image).update(id=sowing.boxes[image["id"]][1]["id"]),
        "either",
    ),
    "of an unknown image": ("unknown-image", box(image_id=999_999), "box"),
    "of an unknown category": ("unknown-category", box(category_id=12), "box"),
    "box NaN": ("box-not-finite", box(bbox=[float("nan"), 0, 5, 5]), "box"),
    "box negative": ("box-negative", box(bbox=[5, 5, -5, 5]), "box"),
    "PNG called jpg": ("misnamed", png, ""),
    "zero-area box": ("zero-area-box", box(bbox=[5, 5, 0, 5]), ""),
    "box outside": ("box-outside", box(bbox=[5, 5, 9000, 5]), ""),
}


@pytest.fixture
def sowing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sowing:
    monkeypatch.chdir(tmp_path)
    return Sowing(tmp_path)


def named(report: Json, sowing: Sowing) -> set[str]:
    """Return the damages that the report lists with their kind and image."""
    found = {(defect["kind"], defect.get("image_id")) for defect in report["defects"]}
    ids = {name: 999_999 if name == "of an unknown image" else image["id"] for name, image in sowing.images.items()}
    return {name for name, (kind, _, _) in DAMAGES.items() if (kind, ids[name]) in found}


def test_each_defect_is_named_and_nothing_is_written(sowing: Sowing, capsys: pytest.CaptureFixture[str]) -> None:
    assert sowing.shard("--workers", "0") == 1
    report = json.loads((sowing.root / "out.report.json").read_bytes())
    assert named(report, sowing) == set(DAMAGES)
    assert sorted(path.name for path in sowing.root.iterdir()) == ["images", "instances.json", "out.report.json"]
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith("detr: instances.json: 12 defects: ")
    for kind, _, cost in DAMAGES.values():
        assert any(line.startswith(f"{kind} ") for line in output.err.splitlines()) == bool(cost)


def test_quarantine_keeps_the_rest_unchanged_and_reports_the_losses(
    sowing: Sowing, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sowing.shard("--workers", "2", "--on-defect", "quarantine") == 0
    out = sowing.root / "out"
    report = json.loads((out / "report.json").read_bytes())
    assert named(report, sowing) == set(DAMAGES)
    lost = {sowing.images[name]["id"] for name, (_, _, cost) in DAMAGES.items() if cost == "image"}
    touched = {image["id"] for image in sowing.images.values()}
    manifest = load_manifest(out)
    assert (
        set(manifest.index().images["image_id"].tolist()) == {image["id"] for image in sowing.original["images"]} - lost
    )
    samples: dict[str, bytes] = {}
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            samples |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for image in sowing.original["images"]:
        if image["id"] not in touched:
            key = f"{image['id']:012d}"
            assert samples[f"{key}.jpg"] == (COCO_TINY / "val2017" / image["file_name"]).read_bytes()
            entry = json.loads(samples[f"{key}.json"])
            boxes = [
                annotation for annotation in sowing.original["annotations"] if annotation["image_id"] == image["id"]
            ]
            assert [annotation["bbox"] for annotation in entry["annotations"]] == [
                annotation["bbox"] for annotation in boxes
            ]
    for name, (_, _, cost) in DAMAGES.items():
        image_id = sowing.images[name]["id"]
        before = sum(annotation["image_id"] == image_id for annotation in sowing.original["annotations"])
        if cost != "image":
            entry = json.loads(samples[f"{image_id:012d}.json"])
            assert len(entry["annotations"]) == before - (cost != "")
    assert f"{sowing.images['PNG called jpg']['id']:012d}.png" in samples
    output = capsys.readouterr()
    counts = report["images_listed"] - report["images"], report["annotations_listed"] - report["annotations"]
    assert counts[0] == len(lost) + 1  # the image that is listed twice is two entries
    assert f"WARNING: left out {counts[0]} of 81 images and {counts[1]} of " in output.err
    assert verify(out).ok
