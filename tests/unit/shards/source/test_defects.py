"""Defects put into a valid source: each is named, and everything else stays unchanged."""

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.dataset.verify import verify
from shards.errors import ShardError
from shards.source.defects import KINDS, Defect, SourceError
from shards.source.report import load_report, parse_report


def rewrite(coco: Any, position: int, change: Any) -> None:
    path = coco.images / coco.data["images"][position]["file_name"]
    path.write_bytes(change(path.read_bytes()))


def encoded(mode: str, size: tuple[int, int], kind: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(7).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def overwrite(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(64) + content[middle + 64 :]


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def field(where: str, position: int, **fields: object) -> Any:
    return lambda coco: coco.data[where][position].update(fields)


def again(where: str, position: int, **fields: object) -> Any:
    return lambda coco: coco.data[where].append(coco.data[where][position] | fields)


@dataclass(frozen=True)
class Sown:
    """A damage that makes one defect of `kind`, the images and annotations it rejects, and the ids in the defect."""

    kind: str
    damage: Any
    image_id: int | None
    images: frozenset[int] = frozenset()
    annotations: frozenset[int] = frozenset()
    annotation_id: int | None = None


# Image 100 (40x64) has annotations 11, 13 and 14; image 107 (43x59, grey) 12, image 142 (58x34) 18 and 19.
OF_100 = {"image_id": 100, "images": frozenset({100}), "annotations": frozenset({11, 13, 14})}
OF_12 = {"image_id": 107, "annotations": frozenset({12}), "annotation_id": 12}
REJECTED = {
    "corrupt bytes": Sown("corrupt", lambda coco: rewrite(coco, 0, overwrite), **OF_100),
    "truncated": Sown("truncated", lambda coco: rewrite(coco, 0, lambda content: content[:-300]), **OF_100),
    "empty": Sown("truncated", lambda coco: rewrite(coco, 0, lambda _: b""), **OF_100),
    "truncated PNG": Sown(
        "truncated", lambda coco: rewrite(coco, 3, lambda content: content[:-300]), 121, frozenset({121})
    ),
    "not an image": Sown("not-an-image", lambda coco: rewrite(coco, 0, lambda _: b"<html>404</html>"), **OF_100),
    "unknown format": Sown(
        "unknown-format", lambda coco: rewrite(coco, 0, lambda _: encoded("RGB", (40, 64), "PPM")), **OF_100
    ),
    "another size": Sown(
        "wrong-size", lambda coco: rewrite(coco, 0, lambda _: encoded("RGB", (64, 40), "JPEG")), **OF_100
    ),
    "missing file": Sown("missing-file", lambda coco: (coco.images / "picture 0.jpg").unlink(), **OF_100),
    "image listed twice": Sown("duplicate-image-id", again("images", 0), 100),
    "image id of two images": Sown("duplicate-image-id", again("images", 0, file_name="picture 1.jpg"), **OF_100),
    "annotation id twice": Sown(
        "duplicate-annotation-id", again("annotations", 1, image_id=142), 142, annotation_id=12
    ),
    "unknown image": Sown(
        "unknown-image", field("annotations", 1, image_id=5), 5, annotations=frozenset({12}), annotation_id=12
    ),
    "unknown category": Sown("unknown-category", field("annotations", 1, category_id=4), **OF_12),
    "box NaN": Sown("box-not-finite", field("annotations", 1, bbox=[0, float("nan"), 1, 1]), **OF_12),
    "box infinite": Sown("box-not-finite", field("annotations", 1, bbox=[0, 0, float("inf"), 1]), **OF_12),
    "box negative": Sown("box-negative", field("annotations", 1, bbox=[0, 0, 5, -1]), **OF_12),
    "no box": Sown("malformed", field("annotations", 1, bbox=None), **OF_12),
    "size in words": Sown("malformed", field("images", 0, width="wide"), **OF_100),
}
NOTED = {
    "PNG called jpg": Sown("misnamed", lambda coco: rewrite(coco, 0, lambda _: encoded("RGB", (40, 64), "PNG")), 100),
    "EXIF orientation": Sown(
        "exif-orientation",
        lambda coco: rewrite(coco, 0, lambda _: encoded("RGB", (40, 64), "JPEG", exif=rotated())),
        100,
    ),
    "CMYK": Sown("cmyk", lambda coco: rewrite(coco, 0, lambda _: encoded("CMYK", (40, 64), "JPEG")), 100),
    "grey": Sown("grey", lambda coco: rewrite(coco, 0, lambda _: encoded("L", (40, 64), "JPEG")), 100),
    "zero-area box": Sown("zero-area-box", field("annotations", 1, bbox=[3, 4, 0, 9]), 107, annotation_id=12),
    "box outside": Sown("box-outside", field("annotations", 1, bbox=[40, 4, 9, 9]), 107, annotation_id=12),
    "no segmentation": Sown("no-segmentation", field("annotations", 1, segmentation=None), 107, annotation_id=12),
    "segmentation in words": Sown(
        "bad-segmentation", field("annotations", 1, segmentation="zzz"), 107, annotation_id=12
    ),
    "outline of a point": Sown(
        "bad-segmentation", field("annotations", 1, segmentation=[[1, 2, 3]]), 107, annotation_id=12
    ),
    "runs of another size": Sown(
        "bad-segmentation",
        field("annotations", 1, segmentation={"counts": [10], "size": [1, 1]}),
        *(107, frozenset(), frozenset(), 12),
    ),
    "box off the image": Sown("box-off-image", field("annotations", 1, bbox=[-9, 4, 8, 9]), 107, annotation_id=12),
    "transparent": Sown("alpha", lambda coco: rewrite(coco, 3, lambda _: encoded("RGBA", (49, 49), "PNG")), 121),
}


def samples(folder: Path) -> dict[int, dict[str, bytes]]:
    """Return each sample's files by extension, by image id."""
    found: dict[int, dict[str, bytes]] = {}
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                found.setdefault(int(key), {})[ending] = tar.extractfile(member).read()
    return found


def named(defects: Any, sown: Sown) -> list[Defect]:
    """Return the defects that the damage made."""
    expected = (sown.kind, sown.image_id, sown.annotation_id)
    return [
        defect
        for defect in defects
        if (defect.kind, defect.image_id, defect.annotation_id) == expected and str(defect.image_id) in defect.text
    ]


@pytest.mark.parametrize("sown", REJECTED.values(), ids=REJECTED)
def test_a_defect_fails_the_write_and_is_named_in_a_report(coco, sown):
    sown.damage(coco)
    with pytest.raises(SourceError) as caught:
        coco.write()
    assert named(caught.value.defects, sown)
    assert "\n" not in str(caught.value)
    assert "--on-defect quarantine" in str(caught.value)
    url = str(coco.root / "out.report.json")
    assert url in str(caught.value)
    report = parse_report(Path(url).read_bytes(), url)
    assert named(report.defects, sown)
    assert (report.policy, report.images, report.annotations) == ("fail", 0, 0)
    assert sorted(path.name for path in coco.root.iterdir()) == ["images", "instances.json", "out.report.json"]


@pytest.mark.parametrize("sown", [*REJECTED.values(), *NOTED.values()], ids=[*REJECTED, *NOTED])
def test_quarantine_leaves_out_only_the_named_images_and_annotations(coco, sown):
    good = samples(Path(coco.write("good").url))
    sown.damage(coco)
    manifest = coco.write(samples_per_shard=3, on_defect="quarantine")
    report = load_report(manifest)
    assert named(report.defects, sown)
    found = samples(coco.root / "out")
    assert found.keys() == good.keys() - sown.images
    for image_id, files in found.items():
        if image_id == sown.image_id and KINDS[sown.kind] == "noted":
            continue  # its file was changed
        before, now = json.loads(good[image_id]["json"]), json.loads(files["json"])
        kept = [annotation for annotation in before["annotations"] if annotation["id"] not in sown.annotations]
        assert now == {"image": before["image"], "annotations": kept}
        image = next(ending for ending in files if "json" not in ending)
        assert files[image] == good[image_id][image]
    ids = set(manifest.index().annotations["annotation_id"].tolist())
    assert ids == set(range(11, 20)) - sown.annotations
    # A duplicated entry is listed once more and left out.
    assert report.images_listed - report.images == len(sown.images) + sown.kind.startswith("duplicate-i")
    assert report.annotations_listed - report.annotations == len(sown.annotations) + sown.kind.startswith("duplicate-a")
    assert verify(coco.root / "out").ok


@pytest.mark.parametrize("sown", NOTED.values(), ids=NOTED)
def test_noted_defects_are_reported_and_written(coco, sown):
    sown.damage(coco)
    manifest = coco.write()
    assert (manifest.images, manifest.annotations) == (7, 9)
    assert named(load_report(manifest).defects, sown)


@pytest.mark.parametrize("segmentation", [None, []])
def test_a_source_with_only_boxes_has_no_segmentation_defects(coco, segmentation):
    for annotation in coco.data["annotations"]:
        annotation["segmentation"] = segmentation
    assert "segmentation" not in " ".join(defect.kind for defect in load_report(coco.write()).defects)


def test_all_defects_of_several_kinds_are_collected(coco):
    for name in ("truncated PNG", "box NaN", "annotation id twice"):
        REJECTED[name].damage(coco)
    REJECTED["image id of two images"].damage(coco)
    with pytest.raises(SourceError) as caught:
        coco.write(samples_per_shard=2)
    assert sorted({defect.kind for defect in caught.value.defects}) == [
        *("box-not-finite", "duplicate-annotation-id", "duplicate-image-id", "truncated")
    ]


def test_a_source_with_only_defects_is_refused(coco):
    for path in coco.images.iterdir():
        path.write_bytes(b"gone")
    with pytest.raises(SourceError, match="7 defects"):
        coco.write(on_defect="quarantine")
    assert not (coco.root / "out").exists()
    assert not (coco.root / "out.partial").exists()


def test_an_existing_data_set_of_another_policy_is_refused(coco):
    coco.write()
    with pytest.raises(ShardError, match="instances, but written with --on-defect fail, not quarantine"):
        coco.write(on_defect="quarantine")


def test_an_existing_data_set_of_other_images_is_refused(coco):
    content = (coco.images / "picture 0.jpg").read_bytes()
    (coco.images / "picture 0.jpg").write_bytes(content[:-300])
    first = coco.write(on_defect="quarantine")
    assert coco.write(on_defect="quarantine") == first
    (coco.images / "picture 0.jpg").write_bytes(content)
    with pytest.raises(ShardError, match=r"an image is not as in .* such as image 100"):
        coco.write(on_defect="quarantine")


def test_an_unreadable_image_is_no_defect_of_the_source(coco, monkeypatch):
    from shards.store import storage

    def fails(url: str) -> bytes:
        if url.endswith("picture 2.jpg"):
            raise OSError(5, "Input/output error")
        return original(url)

    original = storage.read
    monkeypatch.setattr(storage, "read", fails)
    with pytest.raises(ShardError, match=r"picture 2.jpg: cannot be read: .*Input/output error") as caught:
        coco.write(on_defect="quarantine")
    assert not isinstance(caught.value, SourceError)


def test_annotations_of_a_malformed_image_are_no_further_defects(coco):
    coco.data["images"][0]["width"] = "wide"
    with pytest.raises(SourceError) as caught:
        coco.write()
    assert [(defect.kind, defect.image_id) for defect in caught.value.defects] == [("malformed", 100)]


def test_boxes_are_not_compared_with_a_wrong_image_size(coco):
    coco.data["images"][0] |= {"width": 8, "height": 8}  # its boxes lie partly and wholly outside of that
    coco.data["annotations"][2]["bbox"] = [20, 20, 5, 5]
    report = load_report(coco.write(on_defect="quarantine"))
    assert [defect.kind for defect in report.defects if defect.image_id == 100] == ["wrong-size"]
