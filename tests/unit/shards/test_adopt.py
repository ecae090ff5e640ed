import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from shards.adopt import IndexConfig, index_tars
from shards.errors import ShardError
from shards.existing import load_report
from shards.manifest import Manifest
from shards.plan import plan_epoch
from shards.read import open_loader, read_samples
from shards.segmentation import true_runs
from shards.source import SourceError
from shards.verify import verify


def picture(width: int = 40, height: int = 30, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def thing(*box: float, **more: Any) -> dict[str, Any]:
    return {"bbox": list(box), "category_id": 3} | more


def tar(path: Path, *files: tuple[str, Any], end: bool = True) -> None:
    """A tar of these files; what is not bytes becomes JSON."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for name, content in files:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        length = out.offset
    if not end:
        path.write_bytes(path.read_bytes()[:length])


def index(folder: Path | str, **config: Any) -> Manifest:
    return index_tars(folder, IndexConfig(**config))


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.json"
    path.write_text('{"categories": [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 7, "name": "dog"}]}')
    return path


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three samples in two tars, with keys of words, in three forms of annotations."""
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


def test_tars_become_a_data_set_where_they_lie(tars, names):
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    manifest = index(tars, categories=names, workers=2)
    assert {path.name: path.read_bytes() for path in tars.glob("*.tar")} == before
    assert (manifest.name, manifest.images, manifest.annotations) == ("tars", 3, 3)
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [("a.tar", 2), ("b.tar", 1)]
    assert [(one.id, one.name) for one in manifest.categories] == [(3, "cat"), (7, "dog")]
    images = manifest.index().images
    assert images["image_id"].tolist() == [1, 2, 3]  # not all have one, and keys are no numbers
    assert [(one["width"], one["height"], one["count"]) for one in images] == [(40, 30, 1), (30, 30, 2), (20, 10, 0)]
    assert manifest.index().annotations.tolist() == [
        (1, 0, pytest.approx([1, 2, 3, 4]), 9, 0, 0),
        (2, 1, pytest.approx([5, 6, 7, 8]), 56, 1, 1),
        (3, 1, pytest.approx([0, 0, 2, 2]), 4, 0, 0),
    ]
    assert json.loads((tars / "source.json").read_bytes())["categories"][0]["supercategory"] == "animal"
    assert verify(tars).problems == ()


def test_samples_of_tars_are_read_and_loaded(tars, names):
    manifest = index(tars, categories=names)
    one, two, three = read_samples(manifest, [0, 1, 2])
    assert (one.image.shape, two.image.shape, three.image.shape) == ((30, 40, 3), (30, 30, 3), (10, 20, 3))
    assert one.boxes_xyxy.tolist() == [[1, 2, 4, 6]]
    assert two.labels.tolist() == [0]  # the dog is a crowd
    plan = plan_epoch(manifest, seed=1, epoch=0, batch_size=3)
    loader = open_loader(manifest, plan, transform=lambda sample: sample.image_id, collate=sorted)
    assert next(loader) == [1, 2, 3]


def test_a_damaged_foreign_tar_is_told_as_ours_is(tars, names):
    record = index(tars, categories=names).index().images[1]
    content = bytearray((tars / "a.tar").read_bytes())
    content[record["offset"] + 40] ^= 1
    (tars / "a.tar").write_bytes(content)
    (problem,) = verify(tars).problems
    assert (
        "a.tar: its sha256 is not the manifest's: images of 1 samples differ from the index, such as image 2" in problem
    )


@pytest.mark.parametrize(
    ("keys", "ids", "expected"),
    [
        (["a", "b"], [9, 4], [9, 4]),
        (["7", "8"], [9, None], [7, 8]),
        (["7", "8"], [9, -1], [7, 8]),
        (["v1.0/007", "v1.0/008"], [None, None], [7, 8]),
        (["x/7", "y/7"], [None, None], [1, 2]),
        (["7", "8b"], [None, None], [1, 2]),
        (["7", "1234567890123"], [None, None], [1, 2]),
    ],
)
def test_ids_are_those_of_all_json_or_all_keys_or_positions(tmp_path, names, keys, ids, expected):
    files = []
    for key, number in zip(keys, ids, strict=True):
        files += [(f"{key}.jpg", picture()), (f"{key}.json", {"image_id": number, "annotations": []})]
    tar(tmp_path / "tars" / "a.tar", *files)
    assert index(tmp_path / "tars", categories=names).index().images["image_id"].tolist() == expected


def test_annotation_ids_are_kept_where_all_differ(tmp_path, names):
    for number, ids in enumerate([(5, 4), (5, 5), (5, "4")]):
        tar(
            tmp_path / f"{number}" / "a.tar",
            ("a.jpg", picture()),
            ("a.json", [thing(1, 1, 1, 1, id=one) for one in ids]),
        )
        found = index(tmp_path / f"{number}", categories=names).index().annotations["annotation_id"].tolist()
        assert found == ([5, 4] if number == 0 else [1, 2])


def test_categories_are_the_names_in_the_tars_where_nothing_else_says_them(tmp_path):
    boxes = [thing(1, 1, 1, 1, category_id=None, label=name) for name in ("dog", "cat", "dog")]
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", picture()), ("a.json", boxes))
    manifest = index(tmp_path / "tars", name="pets")
    assert [(one.id, one.name) for one in manifest.categories] == [(1, "cat"), (2, "dog")]
    assert manifest.index().annotations["label"].tolist() == [1, 0, 1]
    assert manifest.name == "pets"


def test_ids_of_categories_without_names_are_refused(tars):
    with pytest.raises(ShardError, match=r"do not name their categories; expected --categories FILE") as caught:
        index(tars)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tars.iterdir()) == ["a.tar", "b.tar"]


def test_images_without_annotations_are_a_data_set_only_when_told_so(tmp_path, names):
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", picture()), ("b.jpg", picture()), ("b.json", {"caption": "a cat"}))
    with pytest.raises(
        SourceError, match=r"2 defects: a.tar: sample a: has no JSON; got jpg; .* neither 'annotations'"
    ):
        index(tmp_path / "tars", categories=names)
    assert index(tmp_path / "tars", categories=names, unannotated=True).annotations == 0


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
    for text, words in zip(texts, expected, strict=True):
        assert text.startswith(f"a.tar: sample {words}")
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


def test_every_bad_annotation_is_named_with_its_sample(tmp_path, names):
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", picture()), ("a.json", [box for box, _ in BAD_OBJECTS]))
    with pytest.raises(SourceError, match="6 defects") as caught:
        index(tmp_path / "tars", categories=names)
    for number, (defect, (_, words)) in enumerate(zip(caught.value.defects, BAD_OBJECTS, strict=True), 1):
        assert defect.text.startswith(f"a.tar: sample a: annotation {number} of image 1: {words}")


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
    assert manifest.index().images["image_id"].tolist() == [1, 2, 3, 5]  # numbers of those left out are left out too
    assert manifest.index().images["shard"].tolist() == [0, 0, 1, 2]
    assert manifest.index().annotations["image"].tolist() == [0, 1, 1, 3]
    assert verify(tars).problems == ()
    assert [sample.image.shape for sample in read_samples(manifest, [3])] == [(30, 40, 3)]
    report = load_report(manifest)
    assert (report.images_listed, report.images) == (7, 4)
    rejected = [one.text.partition(": ")[2].partition(":")[0] for one in report.defects if one.rejected]
    assert sorted(rejected) == ["sample four", "sample seven", "sample six"]


def test_a_report_on_other_tars_is_not_kept(tars, names):
    index(tars, categories=names)
    (tars / "manifest.json").unlink()
    (tars / "b.tar").unlink()
    assert load_report(index(tars, categories=names)).images == 2


def test_tars_of_nothing_but_defects_are_no_data_set(tmp_path, names):
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", b""), ("a.json", []))
    with pytest.raises(SourceError, match=r"1 defect: a.tar: sample a: the file is empty"):
        index(tmp_path / "tars", categories=names, on_defect="quarantine")


def test_what_is_worth_knowing_of_samples_is_reported(tmp_path, names):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (40, 30)).save(buffer, "JPEG", exif=exif)
    tar(tmp_path / "tars" / "a.tar", ("a.jpg", buffer.getvalue()), ("a.json", [thing(1, 1, 50, 1), thing(1, 1, 0, 1)]))
    report = load_report(index(tmp_path / "tars", categories=names))
    assert [one.kind for one in report.kinds] == ["exif-orientation", "grey", "zero-area-box", "box-outside"]
    assert all(defect.text.startswith("a.tar: sample a: ") for defect in report.defects)


@pytest.mark.parametrize("same", ["key", "id"])
def test_samples_that_cannot_be_told_apart_are_refused(tmp_path, names, same):
    for number in (1, 2):
        key = "a" if same == "key" else f"a{number}"
        content = {"image_id": 7 if same == "id" else number, "annotations": []}
        tar(tmp_path / "tars" / f"{number}.tar", (f"{key}.jpg", picture()), (f"{key}.json", content))
    expected = "1.tar: sample a: its key is that of 2 samples; 2.tar: sample a: its key is that of 2 samples"
    if same == "id":
        expected = "1.tar: sample a1: its image id 7 is that of 2 samples; 2.tar: sample a2"
    with pytest.raises(SourceError, match=expected):
        index(tmp_path / "tars", categories=names)


def test_segmentations_of_tars_become_masks(tmp_path, names):
    for number, segmentation in enumerate([[[[1, 1, 9, 1, 9, 9]]], None]):
        files = [("a.jpg", picture()), ("a.json", [thing(1, 1, 8, 8)])]
        files += [("a.segmentation.json", segmentation)] if segmentation else []
        tar(tmp_path / f"{number}" / "a.tar", *files)
        manifest = index(tmp_path / f"{number}", categories=names)
        if segmentation:
            assert true_runs(manifest, np.array([0]))[0]["size"] == [30, 40]
        else:
            with pytest.raises(ShardError, match=r"image 1 in a\.tar: annotation 1 has no segmentation"):
                true_runs(manifest, np.array([0]))


@pytest.mark.parametrize("damage", ["cut", "cut between files", "joined", "empty", "packed", "no tar"])
def test_a_tar_that_is_not_whole_is_one_line(tars, names, damage):
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
        for one in tars.iterdir():
            one.rename(tars / f"{one.name}.gz")
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


def test_folders_and_links_in_a_tar_are_passed_over(tars, names):
    with tarfile.open(tars / "b.tar", "a") as out:
        for name, kind in (("deep", tarfile.DIRTYPE), ("four.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            out.addfile(info)
    assert index(tars, categories=names).images == 3
    assert verify(tars).ok


def test_a_data_set_is_not_indexed_again(tars, names):
    index(tars, categories=names)
    with pytest.raises(ShardError, match=r"is a data set already; delete its manifest\.json"):
        index(tars, categories=names)


def test_places_that_cannot_be_indexed_are_one_line(tars, names, tmp_path):
    with pytest.raises(ShardError, match=r"memory://tars: expected WebDataset tars \(\*.tar\), found none"):
        index_tars("memory://tars")
    with pytest.raises(ShardError, match="no such folder"):
        index(tmp_path / "gone")
    (tars / "index").write_text("in the way")
    with pytest.raises(ShardError, match="cannot be written") as caught:
        index(tars, categories=names)
    assert "\n" not in str(caught.value)
    assert not (tars / "manifest.json").exists()


def test_our_own_tars_get_back_the_index_and_the_digest_they_had(coco):
    manifest = coco.write(samples_per_shard=3)
    out = coco.root / "out"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    shutil.rmtree(out / "index")
    for name in ("manifest.json", "source.json"):
        (out / name).unlink()
    again = index(out, categories=coco.annotations)
    assert again.digest == manifest.digest
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    shutil.rmtree(out / "index")
    (out / "manifest.json").unlink()
    alone = index(out)  # with nothing but source.json
    assert alone.files == manifest.files
    assert alone.categories == manifest.categories


def test_a_coco_file_of_other_images_gives_categories_and_nothing_else(coco):
    coco.write()
    out = coco.root / "out"
    for image in coco.data["images"]:
        image["id"] += 1000
    for one in coco.data["annotations"]:
        one["image_id"] += 1000
    coco.annotations.write_text(json.dumps(coco.data))
    for name in ("manifest.json", "source.json"):
        (out / name).unlink()
    assert index(out, categories=coco.annotations).name == "out"


def test_what_is_said_beside_the_tars_stays_as_it_is(coco):
    coco.write()
    path = coco.root / "out" / "source.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), indent=4))
    before = path.read_bytes()
    (coco.root / "out" / "manifest.json").unlink()
    index(coco.root / "out")
    assert path.read_bytes() == before


def test_tars_of_a_remote_store_are_indexed_there(tars, names):
    local = index(tars, categories=names)
    store = fsspec.filesystem("memory")
    for name in ("a.tar", "b.tar"):
        store.pipe_file(f"/{tars.parent.name}/tars/{name}", (tars / name).read_bytes())
    url = f"memory://{tars.parent.name}/tars"
    manifest = index(url, categories=names)
    assert manifest.digest == local.digest
    assert verify(url).ok
    assert [sample.image_id for sample in read_samples(manifest, [2, 0])] == [3, 1]
    with pytest.raises(ShardError, match="is a data set already"):
        index(url, categories=names)
    store.rm(f"/{tars.parent.name}/tars/manifest.json")
    store.pipe_file(f"/{tars.parent.name}/tars/c.tar", (tars / "a.tar").read_bytes())
    with pytest.raises(SourceError, match=f"^{url}: 4 defects: a.tar: sample one: its key is that of 2 samples"):
        index(url, categories=names)
    assert store.exists(f"/{tars.parent.name}/tars.report.json")
    store.rm(f"/{tars.parent.name}", recursive=True)


def test_numbers_that_no_column_holds_and_endless_brackets_are_defects(tmp_path, names):
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
    texts = [one.text for one in load_report(manifest).defects if one.rejected]
    assert [text.split(":")[1].split()[1] for text in texts] == ["brackets", "crowd", "id"]


def test_names_that_are_not_utf_8_are_defects_and_no_traceback(tmp_path, names):
    tar(tmp_path / "tars" / "a.tar", *_pairs({"caf\udce9": {}, "cr\udce8me": [thing(1, 2, 3, 4)]}))
    manifest = index(tmp_path / "tars", categories=names, on_defect="quarantine")
    assert manifest.images == 1
    assert r"a.tar: sample caf\xe9: its JSON has neither" in load_report(manifest).defects[0].text
    tar(tmp_path / "more" / "caf\udce9.tar", *_pairs({"a": [thing(1, 2, 3, 4)]}))
    with pytest.raises(ShardError, match=r"the name of caf\\xe9\.tar is not UTF-8"):
        index(tmp_path / "more", categories=names)


def _pairs(entries: dict[str, Any]) -> list[tuple[str, Any]]:
    """The files of samples: a picture each, and this JSON."""
    return [file for key, one in entries.items() for file in ((f"{key}.jpg", picture()), (f"{key}.json", one))]
