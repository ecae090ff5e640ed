import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shards.config import VocConfig, WriteConfig
from shards.errors import ShardError
from shards.formats.document import write_document
from shards.formats.voc import NAMES, voc_document
from shards.source.defects import SourceError
from shards.source.report import load_report

SIZE = "<size><width>40</width><height>30</height></size>"
PART = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"


def thing(name: str, xmin: Any, ymin: Any, xmax: Any, ymax: Any, more: str = "") -> str:
    return (
        f"<object>{more}<name>{name}</name><bndbox><xmax>{xmax}</xmax><xmin>{xmin}</xmin><ymax>{ymax}</ymax>"
        f"<ymin>{ymin}</ymin></bndbox></object>"
    )


def write(root: Path, stem: str, *objects: str, size: str = SIZE) -> None:
    (root / "Annotations").mkdir(parents=True, exist_ok=True)
    (root / "JPEGImages").mkdir(exist_ok=True)
    (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{''.join(objects)}</annotation>")
    Image.new("RGB", (40, 30), (200, 10, 30)).save(root / "JPEGImages" / f"{stem}.jpg")


def split(root: Path, name: str, *stems: str) -> None:
    (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))


def read(root: Path, **config: Any) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(voc_document(root, VocConfig(**config)).content)
    return content


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOCdevkit" / "VOC2007"
    write(root, "2007_000027", thing("person", 1, 1, 40, 30, f"{PART}<pose>Left</pose>"), thing("dog", 3, 4, 3, 4))
    write(root, "2007_000032", thing("cat", 5.5, 6, 20, 25, "<difficult>1</difficult>"))
    write(root, "2007_000099")
    split(root, "train", "2007_000032", "2007_000027")
    split(root, "val", "2007_000099")
    split(root, "dog_train", "2007_000032 -1", "2007_000027  1")
    return root


def test_boxes_are_pixels_from_1_with_both_ends(voc):
    objects = read(voc)["annotations"]
    assert [(annotation["image_id"], annotation["category_id"], annotation["bbox"]) for annotation in objects] == [
        (2007000027, NAMES.index("person") + 1, [0, 0, 40, 30]),  # the whole image
        (2007000027, NAMES.index("dog") + 1, [2, 3, 1, 1]),  # one pixel
        (2007000032, NAMES.index("cat") + 1, [4.5, 5, 15.5, 20]),
    ]
    assert [annotation["id"] for annotation in objects] == [1, 2, 3]
    assert objects[0]["attributes"] == {"pose": "Left"}
    assert objects[0]["area"] == 1200


def test_zero_based_boxes_are_kept_unchanged(voc):
    assert read(voc, zero_based=True)["annotations"][0]["bbox"] == [1, 1, 39, 29]


def test_split_selects_its_list_and_names_the_data_set(voc):
    assert [image["file_name"] for image in read(voc, split="train")["images"]] == [
        "2007_000027.jpg",
        "2007_000032.jpg",
    ]
    assert voc_document(voc, VocConfig("val")).name == "VOC2007-val"
    assert len(read(voc)["images"]) == 3


@pytest.mark.parametrize("up", [0, 1, 2])
def test_the_folder_is_found_from_the_devkit_too(voc, up):
    root = [voc, *voc.parents][up]
    assert voc_document(root).content == voc_document(voc).content
    if up:
        write(voc.parent / "VOC2012", "a", thing("cat", 1, 1, 2, 2))
        with pytest.raises(ShardError, match=r"holds 2 VOC folders; .*VOC2007, .*VOC2012"):
            voc_document(root)


def test_images_with_an_xml_file_beside_each_are_a_data_set(voc):
    for path in (voc / "Annotations").iterdir():
        path.rename(voc / "JPEGImages" / path.name)
    assert len(read(voc / "JPEGImages")["annotations"]) == 3


def test_the_twenty_names_have_the_labels_of_the_devkit(voc):
    categories = read(voc)["categories"]
    assert [(category["id"], category["name"]) for category in categories][::19] == [
        (1, "aeroplane"),
        (20, "tvmonitor"),
    ]
    assert list(NAMES) == sorted(NAMES)


def test_other_names_are_those_of_all_splits_in_order(voc):
    write(voc, "2007_000100", thing("zebra", 1, 1, 2, 2))
    split(voc, "val", "2007_000099")
    for name in ("train", "val"):
        assert [category["name"] for category in read(voc, split=name)["categories"]] == [
            "cat",
            "dog",
            "person",
            "zebra",
        ]


def test_given_categories_must_contain_every_name(voc, tmp_path):
    (tmp_path / "names.txt").write_text("person\ndog\ncat\n")
    content = read(voc, categories=tmp_path / "names.txt")
    assert [annotation["category_id"] for annotation in content["annotations"]] == [1, 2, 3]
    (tmp_path / "names.txt").write_text("person\ncat\n")
    (defect,) = voc_document(voc, VocConfig(categories=tmp_path / "names.txt")).lost.defects
    assert defect.text == f"2007_000027.xml: 'dog' is not among the categories of {tmp_path}/names.txt"
    assert (defect.kind, defect.image_id) == ("unknown-category", 2007000027)


def test_difficult_objects_are_crowds_unless_kept(voc):
    assert [annotation["iscrowd"] for annotation in read(voc)["annotations"]] == [0, 0, 1]
    kept = read(voc, keep_difficult=True)["annotations"]
    assert [annotation["iscrowd"] for annotation in kept] == [0, 0, 0]
    assert kept[2]["attributes"] == {"difficult": "1"}


def test_missing_size_is_read_from_the_image(voc):
    write(voc, "2007_000027", size="<size><width>0</width><height>0</height></size>")
    write(voc, "2007_000032", size="")
    assert {(image["width"], image["height"]) for image in read(voc)["images"]} == {(40, 30)}


def test_wrong_image_size_is_reported(voc, tmp_path):
    write(voc, "2007_000027", size="<size><width>30</width><height>40</height></size>")
    with pytest.raises(SourceError, match=r"2007_000027.jpg\).*40x30"):
        write_document(voc_document(voc), tmp_path / "out", WriteConfig())


def test_every_defect_is_named_with_its_file(voc, tmp_path):
    write(voc, "2007_000027", thing("dog", "x", 1, 2, 2), thing("dog", 9, 1, 2, 2), thing("", 1, 1, 2, 2), "<object/>")
    write(voc, "2007_000032", thing("cat", "inf", 1, 2, 2), "<object><name>cat</name></object>")
    write(voc, "2007_000099", size="<size><width>wide</width><height>1</height></size>")
    write(voc, "a")
    (voc / "Annotations" / "a.xml").write_text("<annotation>")
    write(voc, "b")
    (voc / "JPEGImages" / "b.jpg").unlink()
    write(voc, "c")
    (voc / "Annotations" / "c.xml").unlink()
    write(voc, "d")
    Image.new("RGB", (40, 30)).save(voc / "JPEGImages" / "d.png")
    document = voc_document(voc)
    texts = [defect.text for defect in document.lost.defects]
    expected = [
        "b: no image of that name in JPEGImages",
        "c.jpg: no c.xml in Annotations",
        "d: several images of that name: d.jpg, d.png",
        "2007_000027.xml: object 1 (dog): its xmin is 'x', not a number",
        "2007_000027.xml: object 2 (dog): its box has a negative size: 9, 1 to 2, 2",
        "2007_000027.xml: object 3 (): it has no name",
        "2007_000027.xml: object 4 (?): it has no name",
        "2007_000032.xml: object 1 (cat): its xmin is 'inf', not a number",
        "2007_000032.xml: object 2 (cat): it has no xmin",
        "2007_000099.xml: size: its width is 'wide', not a number",
        "a.xml: cannot be read as XML: ParseError: no element found: line 1, column 12",
    ]
    assert sorted(texts) == sorted(expected)
    assert (document.lost.images, document.lost.annotations) == (5, 6)
    with pytest.raises(SourceError, match="VOC2007: 11 defects") as caught:
        write_document(document, tmp_path / "out", WriteConfig())
    assert sorted(defect.text for defect in caught.value.defects) == sorted(expected)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_quarantine_drops_defects_and_keeps_the_rest(voc, tmp_path):
    write(voc, "2007_000027", thing("dog", "x", 1, 2, 2), thing("dog", 9, 1, 12, 2), thing("dog", 39, 1, 37, 2))
    (voc / "Annotations" / "2007_000099.xml").write_text("<annotation>")
    (voc / "Annotations" / "2007_000098.xml").write_text("<annotation/>")
    manifest = write_document(voc_document(voc), tmp_path / "out", WriteConfig(on_defect="quarantine"))
    assert sorted(manifest.index().images["image_id"].tolist()) == [2007000027, 2007000032]
    report = load_report(manifest)
    assert (report.images_listed, report.images, report.annotations_listed, report.annotations) == (4, 2, 4, 2)
    assert [(kind.kind, kind.count) for kind in report.kinds if kind.severity == "rejected"] == [
        ("malformed", 3),
        ("missing-file", 1),
    ]


def test_a_limit_hides_what_is_wrong_with_images_behind_it(voc, tmp_path):
    write(voc, "2007_000099", thing("dog", "x", 1, 2, 2))
    assert write_document(voc_document(voc), tmp_path / "out", WriteConfig(limit=2)).images == 2
    with pytest.raises(SourceError, match=r"VOC2007: 1 defect: 2007_000099\.xml: object 1"):
        write_document(voc_document(voc), tmp_path / "all", WriteConfig(limit=3))


def test_a_folder_of_nothing_but_defects_names_them(voc, tmp_path):
    for path in (voc / "Annotations").iterdir():
        path.write_text("<annotation>")
    with pytest.raises(SourceError, match=r"VOC2007: 4 defects: 2007_000027.xml: cannot be read as XML"):
        write_document(voc_document(voc), tmp_path / "out", WriteConfig())


def test_an_xml_file_cannot_swell_or_read_other_files(voc):
    for number, entity in enumerate(['"aaaa"', 'SYSTEM "file:///etc/hostname"']):
        text = f"<!DOCTYPE annotation [<!ENTITY e {entity}>]><annotation><object><name>&e;</name></object></annotation>"
        (voc / "Annotations" / f"2007_0000{(27, 32)[number]}.xml").write_text(text)
    defects = voc_document(voc).lost.defects
    assert len(defects) == 2
    assert all("EntitiesForbidden" in defect.text for defect in defects)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test", r"has no test.txt; expected one of train, val$"),
        ("dog_train", "dog_train.txt: is a list of one class"),
        ("twice", "2007_000027: is listed twice in twice.txt"),
        ("lost", "nobody: no image of that name in JPEGImages"),
    ],
)
def test_a_split_that_cannot_be_used_is_one_line(voc, name, message):
    if name == "twice":
        split(voc, name, "2007_000027", "2007_000027")
    elif name == "lost":
        split(voc, name, "2007_000027", "nobody")
    with pytest.raises(ShardError, match=message) as caught:
        write_document(voc_document(voc, VocConfig(name)), voc / "out", WriteConfig())
    assert "\n" not in str(caught.value)


def test_folder_of_another_layout_is_one_line(voc, tmp_path):
    with pytest.raises(ShardError, match="no such folder"):
        voc_document(tmp_path / "gone")
    with pytest.raises(ShardError, match="has no XML files"):
        voc_document(voc / "JPEGImages")
    (voc / "JPEGImages").rename(voc / "images")
    with pytest.raises(ShardError, match="has Annotations but no JPEGImages"):
        voc_document(voc)


def test_document_is_the_same_for_any_number_of_threads(voc):
    calls = []
    document = voc_document(voc, VocConfig(workers=3), lambda *call: calls.append(call))
    assert document == voc_document(voc)
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_data_set_is_named_after_its_split(voc, tmp_path):
    manifest = write_document(voc_document(voc, VocConfig("train")), tmp_path / "out", WriteConfig())
    assert (manifest.name, manifest.images, manifest.annotations, manifest.num_classes) == ("VOC2007-train", 2, 3, 20)
    assert sorted(manifest.index().boxes_per_image.tolist()) == [0, 2]  # the difficult one is not trained on


def test_names_that_are_not_utf_8_are_left_out_and_named(voc, tmp_path):
    """The folder's own name is one of them, and becomes the data set's."""
    write(voc, "caf\udce9", thing("dog", 1, 1, 2, 2))
    lines = b"2007_000027\ncaf\xe9\ncr\xe8me\n"
    (voc / "ImageSets" / "Main" / "train.txt").write_bytes(lines)
    root = voc.rename(voc.with_name("VOC\udce9"))
    document = voc_document(root, VocConfig("train"))
    manifest = write_document(document, tmp_path / "out", WriteConfig(on_defect="quarantine"))
    assert (manifest.name, manifest.images) == (r"VOC\xe9-train", 1)
    texts = [defect.text for defect in load_report(manifest).defects]
    assert [text.partition(":")[0] for text in texts] == [r"cr\xe8me", r"caf\xe9.jpg"]
