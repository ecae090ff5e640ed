"""Defects put into a valid panoptic source: each is named with its image and segment, and the rest is written."""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.dataset.verify import verify
from shards.errors import ShardError
from shards.panoptic.segment_png import write_png
from shards.source.defects import KINDS, SourceError
from shards.source.panoptic import read_panoptic_source
from shards.source.report import load_report
from tests.support.panoptic_data import CAR, PERSON, SKY, Panoptic, make_panoptic, maps

ALL = {3: [9, 300, 301], 7: [5, 70000, 2**24 - 1], 12: [5]}


@pytest.fixture
def source(tmp_path: Path) -> Panoptic:
    return make_panoptic(tmp_path)


def with_pixels(source: Panoptic, image_id: int, change: Callable[[np.ndarray], object]) -> None:
    ids = maps()[image_id]
    change(ids)
    source.png(image_id).write_bytes(write_png(ids))


def grey(source: Panoptic) -> None:
    buffer = BytesIO()
    Image.new("L", (30, 20)).save(buffer, "PNG")
    source.png(7).write_bytes(buffer.getvalue())


@dataclass(frozen=True)
class Sown:
    """A damage that makes a defect of `kind` of an image and perhaps a segment, and the text that names it.

    `left` are the segments of that image afterwards, None without the image.
    """

    kind: str
    damage: Callable[[Panoptic], object]
    segment: int | None
    text: str
    left: tuple[int, ...] | None = None
    image: int = 7


BOTH = (5, 70000)
SOWN = {
    "missing PNG": Sown("missing-png", lambda it: it.png(7).unlink(), None, "its PNG 7.png is not in the folder"),
    "PNG of another size": Sown(
        "png-size", lambda it: it.png(7).write_bytes(write_png(np.zeros((30, 20), int))), None, "is 20x30 pixels"
    ),
    "grey PNG": Sown("bad-png", grey, None, "has 8 bits of grey; expected 8 bits of RGB"),
    "truncated PNG": Sown(
        "bad-png", lambda it: it.png(7).write_bytes(it.png(7).read_bytes()[:-40]), None, "is truncated or damaged"
    ),
    "JPEG for a PNG": Sown(
        "bad-png", lambda it: it.png(7).write_bytes((it.images / "7.jpg").read_bytes()), None, "is not a PNG"
    ),
    "no annotation": Sown(
        "no-annotation", lambda it: it.data["annotations"].remove(it.annotation(7)), None, "has no annotation"
    ),
    "two annotations": Sown(
        "two-annotations", lambda it: it.data["annotations"].append(it.annotation(7)), None, "two annotations or more"
    ),
    "annotation of no image": Sown(
        "unknown-image",
        lambda it: it.data["annotations"].append(it.annotation(7) | {"image_id": 8}),
        *(None, "no such image is listed", (5, 70000, 2**24 - 1), 8),
    ),
    "name that leaves the folder": Sown(
        "malformed", lambda it: it.annotation(7).update(file_name="../7.png"), None, "leaves the folder of segments"
    ),
    "annotation without a name": Sown(
        "malformed", lambda it: it.annotation(7).pop("file_name"), None, "missing required field file_name"
    ),
    "segment without pixels": Sown(
        "segment-without-pixels",
        lambda it: with_pixels(it, 7, lambda ids: ids.__setitem__((18, 29), 0)),
        *(2**24 - 1, "has no pixels in the PNG", BOTH),
    ),
    "pixels of no segment": Sown(
        "unlisted-segment",
        lambda it: with_pixels(it, 7, lambda ids: ids.__setitem__((19, slice(0, 6)), 44)),
        *(44, "6 pixels of id 44", (*BOTH, 2**24 - 1)),
    ),
    "unknown category": Sown(
        "unknown-category",
        lambda it: it.segment(7, 2**24 - 1).update(category_id=4),
        *(2**24 - 1, "category 4 is not listed", BOTH),
    ),
    "area": Sown(
        "segment-area",
        lambda it: it.segment(7, 70000).update(area=35),
        *(70000, "area is 35, but it has 36 pixels", (*BOTH, 2**24 - 1)),
    ),
    "negative area": Sown(
        "malformed", lambda it: it.segment(7, 2**24 - 1).update(area=-1), 2**24 - 1, "its area is -1", BOTH
    ),
    "box": Sown(
        "segment-box",
        lambda it: it.segment(7, 70000).update(bbox=[2, 10, 22, 6]),
        *(70000, "box is [2, 10, 22, 6], but its pixels have [2, 10, 23, 6]", (*BOTH, 2**24 - 1)),
    ),
    "id of four bytes": Sown(
        "bad-segment-id", lambda it: it.segment(7, 2**24 - 1).update(id=2**24), 2**24, "not in 1..16777215", BOTH
    ),
    "negative id": Sown(
        "bad-segment-id", lambda it: it.segment(7, 2**24 - 1).update(id=-3), -3, "not in 1..16777215", BOTH
    ),
    "id of VOID": Sown(
        "bad-segment-id", lambda it: it.segment(7, 2**24 - 1).update(id=0), 0, "not in 1..16777215", BOTH
    ),
    "segment id twice": Sown(
        "duplicate-segment-id",
        lambda it: it.annotation(7)["segments_info"].append(it.segment(7, 70000) | {"category_id": CAR}),
        *(70000, "its id is given twice", (5, 2**24 - 1)),
    ),
    "stuff twice": Sown(
        "repeated-stuff",
        lambda it: it.segment(7, 70000).update(category_id=SKY),
        *(70000, "category 200 is stuff, and the image has it twice", (*BOTH, 2**24 - 1)),
    ),
    "crowd of stuff": Sown(
        "stuff-crowd", lambda it: it.segment(7, 5).update(iscrowd=1), 5, "is a crowd of stuff", (*BOTH, 2**24 - 1)
    ),
    "crowd of two": Sown(
        "malformed", lambda it: it.segment(7, 5).update(iscrowd=2), 5, "iscrowd is 2", (70000, 2**24 - 1)
    ),
    "segment without an area": Sown(
        "malformed", lambda it: it.segment(7, 5).pop("area"), 5, "missing required field area", (70000, 2**24 - 1)
    ),
    "missing image": Sown("missing-file", lambda it: (it.images / "7.jpg").unlink(), None, "no such file"),
}


@pytest.mark.parametrize("sown", SOWN.values(), ids=SOWN)
def test_a_defect_is_named_and_only_what_it_spoils_is_left_out(source: Panoptic, sown: Sown) -> None:
    sown.damage(source)
    manifest = source.write(on_defect="quarantine")
    report = load_report(manifest)
    named = [defect for defect in report.defects if (defect.kind, defect.annotation_id) == (sown.kind, sown.segment)]
    found = named[0]
    assert found.image_id == sown.image
    assert sown.text in found.text
    assert f"image {sown.image}" in found.text
    index = manifest.index()
    left = {
        int(image["image_id"]): index.annotations_of(row)["annotation_id"].tolist()
        for row, image in enumerate(index.images)
    }
    expected = {**ALL, 7: list(sown.left)} if sown.left is not None else {3: ALL[3], 12: ALL[12]}
    assert left == expected
    assert verify(manifest.url).ok
    assert report.annotations == sum(map(len, expected.values()))


@pytest.mark.parametrize("sown", SOWN.values(), ids=SOWN)
def test_a_rejected_defect_fails_the_write_and_a_noted_one_does_not(source: Panoptic, sown: Sown) -> None:
    sown.damage(source)
    if KINDS[sown.kind] == "noted":
        assert source.write().annotations == 7
        return
    with pytest.raises(SourceError) as caught:
        source.write()
    assert sown.kind in {defect.kind for defect in caught.value.defects}
    assert not (source.root / "out").exists()


def test_a_valid_source_has_no_defect(source: Panoptic) -> None:
    assert load_report(source.write()).defects == ()


def test_defects_beyond_the_limit_are_ignored(source: Panoptic) -> None:
    source.annotation(12)["segments_info"][0]["id"] = -1
    source.data["annotations"].append(source.annotation(7) | {"image_id": 99})
    manifest = source.write(limit=2)
    assert (manifest.name, manifest.images, manifest.annotations) == ("panoptic-first-2", 2, 6)
    report = load_report(manifest)
    assert (report.defects, report.images_listed, report.annotations_listed) == ((), 2, 6)


@pytest.mark.parametrize(("limit", "listed"), [(0, 7), (2, 6)])
def test_malformed_segments_are_counted_as_listed(source: Panoptic, limit: int, listed: int) -> None:
    source.segment(7, 5).pop("area")
    source.segment(12, 5).pop("area")
    report = load_report(source.write(on_defect="quarantine", limit=limit))
    assert (report.annotations, report.annotations_listed) == (5, listed)


@pytest.mark.parametrize("policy", ["fail", "quarantine"])
def test_a_source_without_images_is_refused(source: Panoptic, policy: str) -> None:
    source.data["images"] = []
    with pytest.raises(SourceError, match="1 defect: it lists no images; expected some"):
        source.write(on_defect=policy)


@pytest.mark.parametrize("isthing", [None, 2])
def test_a_category_must_be_a_thing_or_stuff(source: Panoptic, isthing: int | None) -> None:
    source.data["categories"][1]["isthing"] = isthing
    with pytest.raises(SourceError, match=r"categories\[1\]: .*isthing"):
        source.write()


def test_each_format_names_the_command_of_the_other(source: Panoptic) -> None:
    from shards.write.writer import write_coco

    source.write()
    with pytest.raises(ShardError, match=r"panoptic format; .* use `detr shard coco-panoptic`"):
        write_coco(source.images, source.annotations, source.root / "other")
    source.data["annotations"] = [{"id": 1, "image_id": 7, "category_id": PERSON, "bbox": [0, 0, 1, 1]}]
    with pytest.raises(ShardError, match=r"instances format; .* use `detr shard coco`"):
        source.write("other")


def test_a_file_for_the_folder_of_segments_is_named_by_its_option(source: Panoptic) -> None:
    source.write()
    with pytest.raises(ShardError, match="is a file, expected a folder of segments: check that --segments is right"):
        read_panoptic_source(source.images, source.annotations, source.annotations)


def test_a_url_without_segments_is_no_folder_of_images(source: Panoptic) -> None:
    source.write()
    with pytest.raises(ShardError, match=r"memory://none: .* expected a folder of segments"):
        read_panoptic_source(source.images, source.annotations, "memory://none")


def test_stuff_is_not_repeated_by_a_segment_without_pixels(source: Panoptic) -> None:
    segments = source.annotation(7)["segments_info"]
    segments.append(source.segment(7, 5) | {"id": 50})
    report = load_report(source.write(on_defect="quarantine"))
    assert [defect.kind for defect in report.defects] == ["segment-without-pixels"]


def test_stuff_that_two_segments_with_pixels_repeat_is_noted_beside_one_without(source: Panoptic) -> None:
    with_pixels(source, 7, lambda ids: ids.__setitem__((0, slice(0, 6)), 44))
    sky = source.segment(7, 5)
    source.annotation(7)["segments_info"] += [sky | {"id": 44, "area": 6, "bbox": [0, 0, 6, 1]}, sky | {"id": 50}]
    sky["area"], sky["bbox"] = 234, [0, 0, 30, 8]
    named = load_report(source.write(on_defect="quarantine")).defects
    repeated = [defect.annotation_id for defect in named if defect.kind == "repeated-stuff"]
    assert repeated == [5, 44]


@pytest.mark.parametrize("policy", ["fail", "quarantine"])
def test_a_source_without_a_segment_that_can_be_used_is_refused(source: Panoptic, policy: str) -> None:
    for entry in source.data["annotations"]:
        entry["segments_info"] = []
    with pytest.raises(SourceError, match="it lists no segment that can be used; expected some"):
        source.write(on_defect=policy)


def test_the_first_images_may_be_without_a_segment(source: Panoptic) -> None:
    source.annotation(7)["segments_info"] = []
    assert source.write(limit=1).images == 1


def test_an_image_without_a_segment_is_taken(source: Panoptic) -> None:
    source.annotation(12)["segments_info"] = []
    assert source.write().images == 3
