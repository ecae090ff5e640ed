import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.config import WriteConfig, YoloConfig
from shards.errors import ShardError
from shards.formats.document import write_document
from shards.formats.yolo import yolo_document
from shards.read.segmentations import true_runs
from shards.source.defects import SourceError
from shards.source.report import load_report


def write(root: Path, name: str, *lines: str, images: str = "images", labels: str = "labels") -> None:
    path = root / images / f"{name}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 100), (200, 10, 30)).save(path)
    text = root / labels / f"{name}.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    if lines:
        text.write_text("\n".join(lines) + "\n")


def read(root: Path, **config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(yolo_document(root, YoloConfig(**config)).content)
    return content


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    write(root, "b", "0 0.5 0.5 1 1", "1 0.25 0.5 0.1 0.2", "")
    write(root, "a", "2 0.1 0.1 0.5 0.1 0.5 0.9 0.1 0.9")
    write(root, "deep/c")
    (root / "classes.txt").write_text("cat\ndog\nbird\n")
    return root


def test_boxes_are_fractions_of_the_image_sides(yolo):
    content = read(yolo)
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [
        (1, "a.jpg"),
        (2, "b.jpg"),
        (3, "deep/c.jpg"),
    ]
    assert {(image["width"], image["height"]) for image in content["images"]} == {(200, 100)}
    boxes = [
        (annotation["image_id"], annotation["category_id"], annotation["bbox"], annotation["area"])
        for annotation in content["annotations"][1:]
    ]
    assert boxes == [(2, 0, [0, 0, 200, 100], 20000), (2, 1, [40, 40, 20, 20], 400)]
    assert "segmentation" not in content["annotations"][1]


def test_a_polygon_is_the_segmentation_with_the_box_around_it(yolo):
    polygon = read(yolo)["annotations"][0]
    assert polygon["segmentation"] == [[20, 10, 100, 10, 100, 90, 20, 90]]
    assert polygon["bbox"] == [20, 10, 80, 80]
    assert polygon["area"] == 6400
    triangle = "0 0 0 1 0 0 1"
    write(yolo, "a", triangle)
    assert read(yolo)["annotations"][0]["area"] == 10000


def test_polygons_become_masks(yolo, tmp_path):
    manifest = write_document(yolo_document(yolo), tmp_path / "out", WriteConfig())
    (runs,) = true_runs(manifest, manifest.index().rows_of([1]))
    assert runs["size"] == [100, 200]


def test_an_image_without_a_label_file_has_no_objects(yolo, tmp_path):
    manifest = write_document(yolo_document(yolo), tmp_path / "out", WriteConfig())
    assert (manifest.name, manifest.images, manifest.annotations) == ("pets", 3, 3)
    assert manifest.index().images["count"][manifest.index().rows_of([1, 2, 3])].tolist() == [1, 2, 0]
    (noted,) = [defect for defect in load_report(manifest).defects if defect.kind == "no-label-file"]
    assert (noted.image_id, noted.text.partition(":")[0]) == (3, "labels/deep/c.txt")


def test_empty_label_file_is_an_image_without_objects(yolo, tmp_path):
    (yolo / "labels" / "deep" / "c.txt").write_text("")
    manifest = write_document(yolo_document(yolo), tmp_path / "out", WriteConfig())
    assert manifest.images == 3
    assert not [defect for defect in load_report(manifest).defects if defect.kind == "no-label-file"]


def test_sizes_are_those_before_an_exif_rotation(yolo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (200, 100)).save(yolo / "images" / "b.jpg", exif=exif)
    assert {(image["width"], image["height"]) for image in read(yolo)["images"]} == {(200, 100)}


@pytest.mark.parametrize(("images", "labels"), [("images/val", "labels/val"), ("val/images", "val/labels")])
def test_both_layouts_of_splits_are_found(yolo, images, labels):
    root = yolo / "more"
    write(root, "5", "0 0.5 0.5 0.1 0.1", images=images, labels=labels)
    write(root, "6", "0 0.5 0.5 0.1 0.1", images=images.replace("val", "test"), labels=labels.replace("val", "test"))
    (root / "data.yaml").write_text("names: [cat, dog]\nnc: 2\ntrain: ../train/images\n")
    document = yolo_document(root, YoloConfig("val"))
    assert document.name == "more-val"
    assert [image["id"] for image in json.loads(document.content)["images"]] == [5]
    with pytest.raises(ShardError, match=r"no folder images/train or train/images; the splits here are test, val$"):
        yolo_document(root, YoloConfig("train"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("data.yaml", "names: [cat, dog, bird]", [(0, "cat"), (1, "dog"), (2, "bird")]),
        ("pets.yml", "names: {0: cat, 2: bird, 1: dog, 7: cow}", [(0, "cat"), (1, "dog"), (2, "bird"), (7, "cow")]),
        ("labels/classes.txt", "cat\ndog\nbird\n", [(0, "cat"), (1, "dog"), (2, "bird")]),
        ("obj.names", "cat\ndog\nbird\n", [(0, "cat"), (1, "dog"), (2, "bird")]),
    ],
)
def test_names_come_from_the_folder(yolo, name, content, expected):
    (yolo / "classes.txt").unlink()
    (yolo / name).write_text(content)
    assert [(category["id"], category["name"]) for category in read(yolo)["categories"]] == expected


@pytest.mark.parametrize("name", ["other.yaml", "other.txt", "other.json"])
def test_names_of_another_file_can_be_given(yolo, name):
    content = {"other.yaml": "names: [x, y, z]", "other.txt": "x\ny\nz", "other.json": '["x", "y", "z"]'}[name]
    (yolo / "images" / name).write_text(content)
    categories = read(yolo, categories=yolo / "images" / name)["categories"]
    assert [(category["id"], category["name"]) for category in categories] == [(0, "x"), (1, "y"), (2, "z")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.yaml", "names: 3", "expected YOLO's data.yaml with 'names'"),
        ("data.yaml", "names: [a\n  b: {", "expected YOLO's data.yaml"),
        ("data.yaml", "names: !!python/object/apply:os.system ['true']", "expected YOLO's data.yaml"),
        ("data.yaml", "names: []", "names no classes"),
        ("data.yaml", "names: [a]\nkpt_shape: [17, 3]", "describes key points"),
        ("nothing", "", "has no data.yaml and no classes.txt, so the names of its classes are unknown"),
    ],
)
def test_names_that_cannot_be_read_are_one_line(yolo, name, content, message):
    (yolo / "classes.txt").unlink()
    (yolo / name).write_text(content)
    with pytest.raises(ShardError, match=message) as caught:
        read(yolo)
    assert "\n" not in str(caught.value)


BAD_LINES = [
    ("0 0.5 0.5 0.1", "got 4 numbers, expected a class and x, y, width, height, or three points or more"),
    ("0 0.5 0.5 0.1 0.1 0.9", "got 6 numbers, expected a class"),  # a detection with its score
    ("0 0.5 0.5 0.1 0.1 0.9 0.9 0.9", "got 8 numbers"),
    ("0 0.5 0.5 0.1 0.1 0.9 0.9 0.9 0.9 1", "got 10 numbers"),
    ("3 0.5 0.5 0.1 0.1", "got class 3, expected one of the 3 that have names"),
    ("0.5 0.5 0.5 0.1 0.1", "got class 0.5, expected"),
    ("-1 0.5 0.5 0.1 0.1", "got class -1, expected"),
    ("0 50 50 10 10", "got 10..50, expected fractions of the image's sides, 0 to 1"),
    ("0 -0.1 0.5 0.1 0.1", "got -0.1..0.5, expected fractions"),
    ("0 nan 0.5 0.1 0.1", "got '0 nan 0.5 0.1 0.1', expected numbers"),
    ("cat 0.5 0.5 0.1 0.1", "got 'cat 0.5 0.5 0.1 0.1', expected numbers"),
]


def test_every_bad_line_is_named_with_file_and_line(yolo, tmp_path):
    write(yolo, "deep/c", *(line for line, _ in BAD_LINES))
    document = yolo_document(yolo)
    for number, (defect, (_, message)) in enumerate(zip(document.lost.defects, BAD_LINES, strict=True), 1):
        assert defect.text.startswith(f"labels/deep/c.txt line {number}: {message}")
        assert defect.image_id == 3
    with pytest.raises(SourceError, match=r"pets: 11 defects: labels/deep/c.txt line ") as caught:
        write_document(document, tmp_path / "out", WriteConfig())
    assert "\n" not in str(caught.value)
    manifest = write_document(document, tmp_path / "out", WriteConfig(on_defect="quarantine"))
    assert (manifest.images, manifest.annotations) == (3, 3)
    report = load_report(manifest)
    assert (report.images_listed, report.annotations_listed) == (3, 14)


def test_bad_files_are_named(yolo):
    (yolo / "images" / "a.jpg").write_bytes(b"no image")
    (yolo / "labels" / "b.txt").write_bytes(b"\xff\xfe")
    (yolo / "labels" / "z.txt").write_text("0 0.5 0.5 0.1 0.1")
    lost = yolo_document(yolo).lost
    assert (lost.images, lost.annotations) == (3, 0)
    texts = [defect.text for defect in lost.defects]
    assert texts[0] == "labels/z.txt: no image of that name"
    assert texts[1] == "images/a.jpg: its size cannot be read: cannot identify image file 'a.jpg'"
    assert texts[2].startswith("labels/b.txt: cannot be read: 'utf-8' codec can't decode")


def test_folder_of_another_layout_is_one_line(yolo, tmp_path):
    (yolo / "labels" / "classes.txt").write_text("not labels")
    with pytest.raises(ShardError, match="no such folder"):
        yolo_document(tmp_path / "gone")
    with pytest.raises(ShardError, match="has no folder images; see `detr shard yolo --help`"):
        yolo_document(yolo / "images")
    (yolo / "labels").rename(yolo / "lables")
    with pytest.raises(ShardError, match="has images but no labels"):
        yolo_document(yolo)
    (yolo / "labels").mkdir()
    with pytest.raises(ShardError, match="none of the 3 images has an object"):
        yolo_document(yolo)
    (yolo / "images").rename(yolo / "pictures")
    (yolo / "images").mkdir()
    with pytest.raises(ShardError, match="has no images"):
        yolo_document(yolo)


def test_document_is_the_same_for_any_number_of_threads(yolo):
    calls = []
    document = yolo_document(yolo, YoloConfig(workers=3), lambda *call: calls.append(call))
    assert document == yolo_document(yolo)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_image_with_a_non_utf_8_name_is_left_out_and_named(yolo, tmp_path):
    write(yolo, "caf\udce9", "0 0.5 0.5 0.1 0.1", "7 0.5 0.5 0.1 0.1")
    manifest = write_document(yolo_document(yolo), tmp_path / "out", WriteConfig(on_defect="quarantine"))
    report = load_report(manifest)
    assert [defect.text for defect in report.defects if "its name is not" in defect.text] == [
        r"caf\xe9.jpg: its name is not UTF-8, which a COCO JSON cannot hold: rename it"
    ]
    assert any(defect.text.startswith(r"labels/caf\xe9.txt line 2: got class 7") for defect in report.defects)
    assert (report.images_listed - report.images, report.annotations_listed - report.annotations) == (1, 2)
