"""Entries of a COCO JSON in columns."""

import json
import math

import msgspec
import numpy as np
import pytest

from shards.source import columns
from shards.source.columns import annotation_columns, duplicated, image_columns, positions, repeated
from shards.source.defects import Defect


def raws(entries: list[dict]) -> list[msgspec.Raw]:
    return msgspec.json.decode(json.dumps(entries).encode(), type=list[msgspec.Raw])


def annotations(count: int) -> list[dict]:
    return [
        {"id": 7 * n, "image_id": n // 2, "category_id": n % 5, "bbox": [n, n + 0.5, 2, 3], "area": n / 3, "extra": [n]}
        | ({"iscrowd": 1} if n % 4 == 0 else {})
        for n in range(count)
    ]


@pytest.mark.parametrize("chunk", [3, 4096])
def test_columns_hold_all_numbers_and_texts_in_order(chunk, monkeypatch):
    monkeypatch.setattr(columns, "_CHUNK", chunk)
    entries = annotations(10)
    del entries[4]["area"]
    defects: list[Defect] = []
    found = annotation_columns(raws(entries), defects)
    assert defects == []
    for name, field in (("ids", "id"), ("image_ids", "image_id"), ("category_ids", "category_id")):
        assert getattr(found, name).tolist() == [entry[field] for entry in entries]
    assert found.boxes.tolist() == [entry["bbox"] for entry in entries]
    assert found.areas.tolist() == [entry.get("area", 6.0) for entry in entries]
    assert found.iscrowd.tolist() == [entry.get("iscrowd", 0) for entry in entries]
    assert [json.loads(bytes(text)) for text in found.texts] == entries


@pytest.mark.parametrize("chunk", [3, 4096])
def test_malformed_entries_are_named_and_left_out(chunk, monkeypatch):
    monkeypatch.setattr(columns, "_CHUNK", chunk)
    entries = annotations(8)
    entries[1]["bbox"] = [1, 2, 3]
    entries[5]["id"] = 2**64
    entries[6]["area"] = "NaN"  # as Python's json module writes it, made text
    defects: list[Defect] = []
    found = annotation_columns(raws(entries), defects)
    assert found.ids.tolist() == [0, 14, 21, 28, 42, 49]
    assert len(found.texts) == 6
    assert math.isnan(found.areas[4])
    assert [(defect.annotation_id, defect.image_id) for defect in defects] == [(7, 0), (None, 2)]
    assert defects[0].text.startswith("annotations[1] (annotation 7 of image 0): Expected array of length 4")
    assert defects[1].text.startswith("annotations[5] (annotation ? of image 2): Expected int <=")


def test_images_keep_names_and_sizes():
    entries = [{"id": 3, "file_name": "a.jpg", "width": 4, "height": 5}, {"id": 9, "file_name": 5}]
    defects: list[Defect] = []
    found = image_columns(raws(entries), defects)
    assert (found.ids.tolist(), found.names, found.widths.tolist(), found.heights.tolist()) == (
        [3],
        ["a.jpg"],
        [4],
        [5],
    )
    assert [defect.image_id for defect in defects] == [9]
    assert found.take(np.array([0])) is found


def test_positions_of_values_or_minus_one():
    known = np.array([50, 10, 30])
    assert positions(np.array([30, 50, 7, 99, 10]), known).tolist() == [2, 0, -1, -1, 1]
    assert positions(np.array([1]), np.zeros(0, np.int64)).tolist() == [-1]


def test_duplicated_and_repeated_ids_are_found():
    ids = np.array([5, 3, 5, 9, 3, 5])
    assert duplicated(ids).tolist() == [True, True, True, False, True, True]
    assert repeated(ids).tolist() == [False, False, True, False, True, True]
    assert repeated(np.array([3, 1, 2])).tolist() == [False] * 3


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"id": "x"}, (None, 2)),
        ({"id": 2**70}, (None, 2)),
        ({"id": 35.0}, (35, 2)),
        ({"image_id": "2"}, (35, 2)),
        ({"image_id": None}, (35, None)),
        ({"id": None, "image_id": [2]}, (None, None)),
    ],
)
def test_a_malformed_id_does_not_hide_the_other_id(fields, named):
    defects: list[Defect] = []
    annotation_columns(raws([annotations(8)[5] | fields]), defects)
    assert [(defect.annotation_id, defect.image_id) for defect in defects] == [named]
    annotation_id, image_id = ("?" if number is None else number for number in named)
    name = "" if named == (None, None) else f" (annotation {annotation_id} of image {image_id})"
    assert defects[0].text.startswith(f"annotations[0]{name}: Expected int")


def test_an_entry_that_is_not_an_object_is_named_by_its_position():
    defects: list[Defect] = []
    annotation_columns(msgspec.json.decode(b"[7]", type=list[msgspec.Raw]), defects)
    assert [defect.text for defect in defects] == ["annotations[0]: Expected object, got int"]
