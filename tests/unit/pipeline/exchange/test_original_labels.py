"""Labels of imported models and the categories that name them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detr.config import ModelConfig
from detr.model import build_model
from pipeline.errors import ExchangeError
from pipeline.evaluation.evaluate_model import match_categories
from pipeline.exchange import import_original as original_importer
from pipeline.exchange.import_original import coco_names
from shards.dataset.categories import Category
from shards.dataset.manifest import load_manifest
from tests.support.original_files import QUICK, assert_one_line


def test_coco_s_labels_are_its_category_ids() -> None:
    names = coco_names()
    assert len(names) == 80
    assert (names[1], names[13], names[18], names[90]) == ("person", "stop sign", "dog", "toothbrush")
    assert not {0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83} & names.keys()
    labels, source = original_importer._categories(91, None)
    assert [category.id for category in labels] == list(range(91))
    assert (labels[0].name, labels[12].name, labels[90].name) == ("N/A", "N/A", "toothbrush")
    assert "COCO" in source


def test_panoptic_labels_are_coco_s_things_and_stuff() -> None:
    labels, source = original_importer._categories(250, None)
    assert [category.id for category in labels] == list(range(250))
    assert (labels[0].name, labels[18].name, labels[92].name, labels[249].name) == ("N/A", "dog", "banner", "N/A")
    assert (labels[18].isthing, labels[92].isthing, labels[200].color) == (True, False, (250, 141, 255))
    assert "things and stuff are COCO's" in source


@pytest.mark.parametrize("form", ["annotations", "list"])
def test_other_classes_are_named_by_a_file(tmp_path: Path, form: str) -> None:
    listed = [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 1, "name": "bus"}]
    content = listed if form == "list" else {"images": [{"id": 1}], "categories": listed}
    (tmp_path / "c.json").write_text(json.dumps(content))
    labels, _ = original_importer._categories(5, tmp_path / "c.json")
    assert [(label.id, label.name) for label in labels] == [(0, "N/A"), (1, "bus"), (2, "N/A"), (3, "cat"), (4, "N/A")]


def test_things_are_true_or_1_in_a_file(tmp_path: Path) -> None:
    kinds = (True, 1, False, 0)
    listed = [{"id": number, "name": f"{number}", "isthing": kind} for number, kind in enumerate(kinds)]
    (tmp_path / "c.json").write_text(json.dumps(listed))
    labels, _ = original_importer._categories(4, tmp_path / "c.json")
    assert [label.isthing for label in labels] == [True, True, False, False]


@pytest.mark.parametrize(("masks", "kind", "batch"), [(True, False, 1), (True, None, 2), (False, False, 2)])
def test_an_imported_panoptic_model_is_evaluated_without_padding(masks: bool, kind: bool | None, batch: int) -> None:
    model = build_model(replace(ModelConfig(**(QUICK | {"backbone": "resnet18"})), masks=masks), 1)
    card = original_importer._card(model, (Category(0, "sky", kind),), 0, "w.pth")
    assert card.evaluate_batch_size == batch


def test_other_classes_are_named_by_number_without_a_file() -> None:
    labels, source = original_importer._categories(3, None)
    assert labels == (Category(0, "0"), Category(1, "1"), Category(2, "2"))
    assert "give --categories FILE" in source


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"id": 3, "name": "cat"}], "has category id 3; expected ids from 0 to 2"),
        ([{"id": -1, "name": "cat"}], "has category id -1"),
        ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "has an id twice"),
        ([{"id": 1, "name": "cat", "isthing": 2}], "isthing"),
        ([{"id": 1, "name": "cat", "color": [0, 0, 256]}], "color"),
        ([{"id": 1, "name": "cat", "isthing": 1}, {"id": 2, "name": "sky"}], "only some categories have `isthing`"),
        ({"images": []}, "expected JSON with COCO's `categories`"),
        ("text", "expected JSON with COCO's `categories`"),
    ],
)
def test_categories_that_do_not_fit_are_one_line(tmp_path: Path, content: object, message: str) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ExchangeError, match=message) as caught:
        original_importer._categories(3, tmp_path / "c.json")
    assert_one_line(caught)


def test_labels_without_a_category_match_nothing_of_a_data_set(tiny_data: Any) -> None:
    """Labels named N/A match nothing, even if the data set has a category with that id."""
    manifest = load_manifest(tiny_data.val)
    labels = (
        Category(0, "N/A"),
        Category(1, "circle"),
        Category(2, "N/A"),
        Category(3, "triangle"),
        Category(9, "N/A"),
    )
    assert match_categories(labels, manifest).tolist() == [-1, 0, -1, 2, -1]
