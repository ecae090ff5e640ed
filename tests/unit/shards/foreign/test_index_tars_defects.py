"""Defects in foreign tars: each named with its sample, or left out by quarantine."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.dataset.verify import verify
from shards.errors import ShardError
from shards.read.loader import read_samples
from shards.source.defects import SourceError
from shards.source.report import load_report
from tests.support.foreign_tars import index, picture, tar, thing
from tests.support.panoptic_data import make_panoptic


def test_samples_without_annotations_are_accepted_only_on_request(tmp_path, names):
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", picture()), ("b.jpg", picture()), ("b.json", {"caption": "a cat"}))
    with pytest.raises(
        SourceError, match=r"2 defects: a.tar: sample a: has no JSON; got jpg; .* neither 'annotations'"
    ):
        index(tmp_path / "tars", categories=names)
    assert index(tmp_path / "tars", categories=names, without_annotations=True).annotations == 0


@pytest.mark.parametrize("policy", ["fail", "quarantine"])
def test_tars_of_a_panoptic_data_set_are_refused(tmp_path, policy):
    folder = Path(make_panoptic(tmp_path).write().url)
    (folder / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"000003.segments.png: is of a panoptic data set, .* copy its manifest.json"):
        index(folder, on_defect=policy)
    assert not (folder / "manifest.json").exists()


def test_every_defect_is_named_with_its_sample(tmp_path, names):
    good = picture()
    tar(
        tmp_path / "tars" / "a.tar",
        *[("a.json", [])],
        *[("b.jpg", b"no image"), ("b.json", [])],
        *[("c.jpg", good[:-100]), ("c.json", [])],
        *[("d.jpg", good), ("d.png", good), ("d.json", [])],
        *[("e.jpg", good), ("e.json", {"annotations": [], "image": {"width": 30, "height": 40}})],
        *[("f.jpg", good), ("f.json", b"{")],
        *[("g.jpg", good), ("g.json", [{"bbox": [1, 2, 3]}])],
        *[("h.jpg", good), ("h.pyd", b"\x80\x04N.")],
        *[("i.jpg", picture(kind="PPM")), ("i.json", [])],
        *[("j.jpg", good), ("j.json", []), ("j.jpg", good)],
        *[("k.jpg", good), ("k.json", [thing(1, 1, 1, 1)]), ("k.segmentation.json", [])],
        *[("l.jpg", good), ("l.a.json", []), ("l.b.json", [])],
    )
    with pytest.raises(SourceError, match="12 defects") as caught:
        index(tmp_path / "tars", categories=names)
    expected = [
        "a: has no image; got only json",
        "b: is not an image that Pillow can read",
        "c: cannot be decoded: Premature end of JPEG file",
        "d: has 2 images: d.jpg, d.png; expected one",
        "e: is 40x30 pixels (before any EXIF rotation), but its JSON says 30x40",
        "f: its JSON: Input data was truncated",
        "g: its JSON: Expected array of length 4 - at $[0].bbox",
        "h: has no JSON; got jpg, pyd",
        "i: its format PPM is none of",
        "j: holds j.jpg twice",
        "k: k.segmentation.json is no list with one segmentation for each of its 1 annotations",
        "l: has 2 JSON files: l.a.json, l.b.json; expected one",
    ]
    texts = sorted(defect.text for defect in caught.value.defects)
    for text, start in zip(texts, expected, strict=True):
        assert text.startswith(f"a.tar: sample {start}")
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "tars").iterdir()] == ["a.tar"]
    report = json.loads((tmp_path / "tars.report.json").read_bytes())
    assert (len(report["defects"]), report["images_listed"], report["images"]) == (12, 12, 0)


BAD_OBJECTS = [
    (thing(1, 1, -1, 1), "its box [1, 1, -1, 1] or area -1 is negative"),
    (thing(1, 1, 1, 1, area=-2), "its box [1, 1, 1, 1] or area -2 is negative"),
    (thing(1, 1, 1, 1, category_id=4), "its category 4 is not listed"),
    (thing(1, 1, 1, 1, category_id=None, category="cow"), "its category 'cow' is not listed"),
    (thing(1, 1, 1, 1, category_id=None), "has no category_id and no category"),
    (thing(1, 1, 1, 1, iscrowd=2), "its iscrowd is 2, not 0 or 1"),
]


def test_every_malformed_annotation_is_named_with_its_sample(tmp_path, names):
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", picture()), ("a.json", [box for box, _ in BAD_OBJECTS]))
    with pytest.raises(SourceError, match="6 defects") as caught:
        index(tmp_path / "tars", categories=names)
    for number, (defect, (_, message)) in enumerate(zip(caught.value.defects, BAD_OBJECTS, strict=True), 1):
        assert defect.text.startswith(f"a.tar: sample a: annotation {number} of image 1: {message}")


def test_quarantine_leaves_samples_out_of_the_index_and_reports_them(tars, names):
    tar(tars / "c.tar", ("four.jpg", picture()), ("four.json", [thing(0, 0, 9, 9), thing(1, 1, -1, 1)]))
    tar(tars / "d.tar", ("five.jpg", picture()), ("five.json", [thing(0, 0, 9, 9)]), ("six.jpg", b""), ("six.json", []))
    tar(tars / "e.tar", ("seven.jpg", picture()[:-100]), ("seven.json", []))
    with pytest.raises(SourceError, match="3 defects"):
        index(tars, categories=names)
    assert (tars.parent / "tars.report.json").exists()
    manifest = index(tars, categories=names, on_defect="quarantine")
    assert not (tars.parent / "tars.report.json").exists()
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("a.tar", 2), ("b.tar", 1), ("d.tar", 1)]
    assert manifest.index().images["image_id"].tolist() == [
        1,
        2,
        3,
        5,
    ]  # the numbers of rejected samples are not used again
    assert manifest.index().images["shard"].tolist() == [0, 0, 1, 2]
    assert manifest.index().annotations["image"].tolist() == [0, 1, 1, 3]
    assert verify(tars).problems == ()
    assert [sample.image.shape for sample in read_samples(manifest, [3])] == [(30, 40, 3)]
    report = load_report(manifest)
    assert (report.images_listed, report.images) == (7, 4)
    rejected = [defect.text.partition(": ")[2].partition(":")[0] for defect in report.defects if defect.rejected]
    assert sorted(rejected) == ["sample four", "sample seven", "sample six"]


def test_a_report_on_other_tars_is_not_kept(tars, names):
    index(tars, categories=names)
    (tars / "manifest.json").unlink()
    (tars / "b.tar").unlink()
    assert load_report(index(tars, categories=names)).images == 2


def test_tars_with_only_defects_are_refused(tmp_path, names):
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", b""), ("a.json", []))
    with pytest.raises(SourceError, match=r"1 defect: a.tar: sample a: the file is empty"):
        index(tmp_path / "tars", categories=names, on_defect="quarantine")


def test_notes_on_samples_are_reported(tmp_path, names):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 30)).save(buffer, "JPEG", exif=exif)
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", buffer.getvalue()), ("a.json", [thing(1, 1, 50, 1), thing(1, 1, 0, 1)]))
    report = load_report(index(tmp_path / "tars", categories=names))
    assert [kind.kind for kind in report.kinds] == ["exif-orientation", "grey", "zero-area-box", "box-outside"]
    assert all(defect.text.startswith("a.tar: sample a: ") for defect in report.defects)


@pytest.mark.parametrize("same", ["key", "id"])
def test_samples_with_the_same_key_or_id_are_refused(tmp_path, names, same):
    for number in (1, 2):
        key = "a" if same == "key" else f"a{number}"
        content = {"image_id": 7 if same == "id" else number, "annotations": []}
        tar(tmp_path / "tars" / f"{number}.tar", (f"{key}.jpg", picture()), (f"{key}.json", content))
    expected = "1.tar: sample a: its key is that of 2 samples; 2.tar: sample a: its key is that of 2 samples"
    if same == "id":
        expected = "1.tar: sample a1: its image id 7 is that of 2 samples; 2.tar: sample a2"
    with pytest.raises(SourceError, match=expected):
        index(tmp_path / "tars", categories=names)


@pytest.mark.parametrize("damage", ["cut", "cut between files", "joined", "empty", "packed", "no tar"])
def test_a_damaged_tar_raises_one_line(tars, names, damage):
    path = tars / "a.tar"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:900])
    elif damage == "cut between files":
        tar(path, ("one.jpg", picture()), ("one.json", []), end=False)
    elif damage == "joined":
        path.write_bytes(content + (tars / "b.tar").read_bytes())
    elif damage == "empty":
        tar(path)
    elif damage == "packed":
        for file in tars.iterdir():
            file.rename(tars / f"{file.name}.gz")
    else:
        path.write_bytes(picture() * 20)
    expected = {
        "cut between files": "does not end as a tar does, so it may have been cut off",
        "joined": "something follows its end, such as another tar",
        "empty": "holds no files",
        "packed": r"found only compressed ones, such as a.tar.gz",
    }
    with pytest.raises(ShardError, match=expected.get(damage, "a.tar: not a whole tar")) as caught:
        index(tars, categories=names)
    assert "\n" not in str(caught.value)
    assert not (tars / "manifest.json").exists()


def test_huge_numbers_and_deep_nesting_are_defects(tmp_path, names):
    brackets = json.dumps(thing(1, 2, 3, 4)).replace("}", ', "more": ' + "[" * 3000 + "]" * 3000 + "}")
    entries = {
        "id": [thing(1, 2, 3, 4, id=1 << 63)],
        "crowd": [thing(1, 2, 3, 4, iscrowd=1 << 63)],
        "brackets": f"[{brackets}]".encode(),
        "sound": [thing(1, 2, 3, 4)],
    }
    tar(tmp_path / "tars" / "a.tar", *_pairs(entries))
    manifest = index(tmp_path / "tars", categories=names, on_defect="quarantine")
    assert manifest.images == 1
    texts = [defect.text for defect in load_report(manifest).defects if defect.rejected]
    assert [text.split(":")[1].split()[1] for text in texts] == ["brackets", "crowd", "id"]


def test_names_that_are_not_utf_8_are_defects(tmp_path, names):
    tar(tmp_path / "tars" / "a.tar", *_pairs({"caf\udce9": {}, "cr\udce8me": [thing(1, 2, 3, 4)]}))
    manifest = index(tmp_path / "tars", categories=names, on_defect="quarantine")
    assert manifest.images == 1
    assert r"a.tar: sample caf\xe9: its JSON has neither" in load_report(manifest).defects[0].text
    tar(tmp_path / "more" / "caf\udce9.tar", *_pairs({"a": [thing(1, 2, 3, 4)]}))
    with pytest.raises(ShardError, match=r"the name of caf\\xe9\.tar is not UTF-8"):
        index(tmp_path / "more", categories=names)


def _pairs(entries: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the files of samples with these keys and JSON contents, each with an image."""
    files = []
    for key, content in entries.items():
        files += [(f"{key}.jpg", picture()), (f"{key}.json", content)]
    return files
