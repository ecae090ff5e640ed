import json

import pytest
from PIL import Image

from shards.errors import ShardError
from shards.source.coco import read_source
from shards.source.defects import SourceError
from shards.source.report import load_report
from shards.write import shard as shard_writer
from shards.write.writer import write_coco


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def change(where: str, position: int, **fields: object):
    def apply(data: dict) -> None:
        data[where][position] |= fields

    return apply


def drop(where: str, position: int, field: str):
    def apply(data: dict) -> None:
        del data[where][position][field]

    return apply


DEFECTS = [
    (change("images", 0, file_name="gone.jpg"), "image 100 (gone.jpg): no such file"),
    (change("images", 0, file_name="x" * 5000), "xxx): no such file"),
    (change("images", 0, file_name="../x.jpg"), "image 100 (../x.jpg): its file name leaves the folder"),
    (change("images", 0, file_name="/etc/passwd"), "image 100 (/etc/passwd): its file name leaves the folder"),
    (change("images", 0, id=107), "image 107 (picture 1.jpg): its id is given twice"),
    (change("images", 5, id=-5), "image -5 (picture 5.jpg): its id is not in 0..999999999999"),
    (change("images", 3, width=0), "image 121 (picture 3.png): its size is 0x49"),
    (change("images", 3, width="wide"), "images[3] (image 121): Expected int, got str - at $.width"),
    (drop("images", 3, "height"), "images[3] (image 121): Object missing required field height"),
    (change("annotations", 1, image_id=5), "annotation 12 of image 5: no such image is listed"),
    (change("annotations", 1, category_id=4), "annotation 12 of image 107: its category 4 is not listed"),
    (change("annotations", 1, id=11), "annotation 11 of image 107: its id is given twice"),
    (change("annotations", 1, bbox=[0, 0, -3, 4]), "annotation 12 of image 107: its box [0, 0, -3, 4]"),
    (
        change("annotations", 1, bbox=[0, 0, float("nan"), 4]),
        "annotation 12 of image 107: its box [0, 0, nan, 4]",
    ),
    (
        change("annotations", 1, bbox=[0, 0, float("inf"), 4]),
        "annotation 12 of image 107: its box [0, 0, inf, 4]",
    ),
    (
        change("annotations", 1, bbox=[0, 0, 4]),
        "annotations[1] (annotation 12 of image 107): Expected array of length 4",
    ),
    (change("annotations", 1, area=-1), "annotation 12 of image 107: its box [0, 0, 10, 10] or area -1"),
    (change("annotations", 1, iscrowd=2), "annotation 12 of image 107: its iscrowd is 2, not 0 or 1"),
    (change("categories", 1, id=90), "category id 90 is given twice"),
    (change("categories", 1, name=5), "categories[1]: Expected str, got int - at $.name"),
    (change("images", 1, id=2**70), "images[1]: Expected `int` <= 9223372036854775807".replace("`", "")),
    (lambda data: data["images"].clear(), "it lists no images"),
    (lambda data: data["images"].pop(), "annotation 18 of image 142: no such image is listed"),
]


@pytest.mark.parametrize(("damage", "message"), DEFECTS, ids=[message for _, message in DEFECTS])
def test_a_defect_names_the_entry_and_nothing_is_written(coco, damage, message):
    damage(coco.data)
    with pytest.raises(SourceError) as caught:
        coco.write()
    assert message in one_line(caught.value)
    assert not (coco.root / "out").exists()
    assert not (coco.root / "out.partial").exists()


def test_all_defects_are_collected_and_the_first_few_named(coco):
    for entry in coco.data["annotations"]:
        entry["category_id"] = 12
    coco.data["images"][2]["file_name"] = "gone.jpg"
    with pytest.raises(SourceError) as caught:
        coco.write()
    assert len(caught.value.defects) == 9  # of image 114 one for all: its annotation goes with it
    message = one_line(caught.value)
    assert "instances.json: 9 defects: image 114 (gone.jpg)" in message
    assert message.count("annotation ") == 2
    assert "and 6 more" in message


def test_damaged_images_of_all_shards_are_collected(coco):
    files = coco.images
    (files / "picture 0.jpg").write_bytes(b"")
    (files / "picture 1.jpg").write_bytes((files / "picture 1.jpg").read_bytes()[:-300])
    (files / "picture 3.png").write_bytes((files / "picture 3.png").read_bytes()[:-300])
    Image.new("RGB", (40, 41)).save(files / "picture 4.jpg")
    Image.new("RGB", (55, 39)).save(files / "picture 5.jpg", format="PPM")
    with pytest.raises(SourceError) as caught:
        coco.write(samples_per_shard=2)
    texts = [defect.text for defect in caught.value.defects]
    assert len(texts) == 5
    assert "image 100 (picture 0.jpg): the file is empty" in texts[0]
    assert "image 107 (picture 1.jpg): cannot be decoded: Premature end of JPEG file" in texts[1]
    assert "image 121 (picture 3.png): cannot be decoded" in texts[2]
    assert "is 40x41 pixels (before any EXIF rotation), but the JSON says 52x44" in texts[3]
    assert "image 135 (picture 5.jpg): its format PPM is none of" in texts[4]
    assert sorted(path.name for path in coco.root.iterdir()) == ["images", "instances.json", "out.report.json"]
    one_line(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n", "not JSON"),
        (b"", "is empty"),
        (b'{"images": [', "not JSON"),
        (b"[1, 2]", "not a JSON object"),
        (b'{"images": []}', "has no 'annotations' and no 'categories'"),
        (b'{"images": 3, "annotations": [], "categories": []}', "its 'images' are no list"),
        (b'{"images": [], "annotations": [], "categories": []}', "lists no categories"),
    ],
)
def test_a_file_that_is_not_coco_gets_one_clear_line(coco, content, message):
    coco.annotations.write_bytes(content)
    with pytest.raises(ShardError) as caught:
        read_source(coco.images, coco.annotations)
    assert message in one_line(caught.value)
    assert "instances.json" in str(caught.value)


def test_absent_and_swapped_paths_get_one_clear_line(coco):
    coco.annotations.write_text(json.dumps(coco.data))
    for images, annotations, message in [
        (coco.root / "none", coco.annotations, "no such folder of images"),
        (coco.images, coco.root / "none.json", "no such COCO JSON file"),
        (coco.annotations, coco.images, "is a file, expected a folder of images"),
        (coco.images, coco.images, "is a folder, expected a COCO JSON file"),
    ]:
        with pytest.raises(ShardError, match=message) as caught:
            read_source(images, annotations)
        one_line(caught.value)


def test_area_and_iscrowd_may_be_absent(coco):
    drop("annotations", 0, "area")(coco.data)
    drop("annotations", 0, "iscrowd")(coco.data)
    index = coco.write().index()
    record = index.annotations[index.annotations["annotation_id"] == 11][0]
    assert record["area"] == pytest.approx(20.1 * 30.7)
    assert record["iscrowd"] == 0


def test_endlessly_nested_json_is_one_line(coco):
    text = json.dumps(coco.data)
    deep = "[" * 3000 + "]" * 3000
    for content in (text.replace('"bbox"', f'"x": {deep}, "bbox"', 1), text[:-1] + f', "x": {deep}}}'):
        coco.annotations.write_text(content)
        with pytest.raises(ShardError, match="brackets are nested too deeply"):
            write_coco(coco.images, coco.annotations, coco.root / "out")


@pytest.mark.parametrize("where", ["sample_texts", "outline_defects"])
def test_json_too_deep_for_a_worker_is_one_line(coco, monkeypatch, where):
    def fails(*_):
        raise RecursionError

    monkeypatch.setattr(shard_writer, where, fails)
    with pytest.raises(ShardError, match=r"image \d+ \(picture \d.*\): its JSON is nested too deeply"):
        coco.write()


def test_a_box_of_huge_numbers_is_noted(coco):
    change("annotations", 1, bbox=[1e308, 0, 1e308, 1])(coco.data)
    noted = [defect.text for defect in load_report(coco.write()).defects if defect.annotation_id == 12]
    assert noted == ["annotation 12 of image 107: its box [1e+308, 0, 1e+308, 1] lies wholly outside the image"]
