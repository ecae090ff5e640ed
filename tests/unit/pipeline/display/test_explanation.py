from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from pipeline.display import explanation
from pipeline.display.explanation import confused_pairs, suspect_pictures, suspects_table, worst_pictures
from pipeline.display.report import report_page
from shards.dataset.categories import Category
from shards.dataset.index import Index
from shards.dataset.manifest import Manifest, load_manifest
from shards.score.coco_eval import score_detections
from shards.score.detections import Detections
from shards.score.diagnosis import diagnose
from tests.support.labelled import learned_by_heart, with_labels
from tests.support.panoptic_data import make_panoptic
from tests.support.tiny_data import TinyData


@pytest.fixture
def right(tiny_data: TinyData) -> Manifest:
    return load_manifest(tiny_data.train)


@pytest.fixture
def wrong(right: Manifest) -> Manifest:
    """Swap the class of the first object."""
    annotations = np.array(right.index().annotations)
    annotations["label"][0] = (annotations["label"][0] + 1) % right.num_classes
    return with_labels(right, Index(right.index().images, annotations))


def test_pictures_are_pairs_of_one_size(right: Manifest, wrong: Manifest) -> None:
    found = learned_by_heart(right)
    diagnosis = diagnose(wrong, found)
    pictures = [*worst_pictures(wrong, found, diagnosis), *suspect_pictures(wrong, diagnosis.suspects)]
    assert len(pictures) == len(diagnosis.worst) + len(diagnosis.suspects) > 2
    assert {picture.size for picture in pictures} == {(646, 262)}


def test_only_errors_have_names_in_the_worst_images(right: Manifest, wrong: Manifest) -> None:
    found = learned_by_heart(right)
    sure = found.take(found.scores >= 0.5)
    (agreed,) = worst_pictures(right, sure, diagnose(right, sure, worst=1))
    first = int(right.index().images["image_id"][right.index().annotations["image"][0]])
    diagnosis = diagnose(wrong, sure, worst=1)
    assert diagnosis.worst[0].image_id == first
    (wrongly,) = worst_pictures(wrong, sure, diagnosis)
    assert text_pixels(wrongly) > 2 * text_pixels(agreed)


def test_only_errors_of_things_have_names_in_the_worst_images_of_panoptic_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sky, person and car of image 7 are not found; of image 3 grass is, and its crowd is no error, but its car is."""
    manifest = make_panoptic(tmp_path).write()
    boxes = np.array([[0, 0, 30, 20], [5, 12, 8, 6]], np.float64)
    found = Detections(np.array([3, 3]), np.array([2, 0]), np.full(2, 0.9, np.float32), boxes)
    drawn = []
    monkeypatch.setattr(explanation, "draw", lambda frame, boxes: drawn.append(boxes) or frame)
    list(worst_pictures(manifest, found, diagnose(manifest, found, worst=2)))
    assert [boxes.names for boxes in drawn] == [[], ["", "person", "car"], ["person"], ["", "", "car"]]


def test_the_page_of_panoptic_data_proposes_no_corrections(tmp_path: Path) -> None:
    manifest = make_panoptic(tmp_path).write()
    boxes = np.array([[2, 3, 8, 6]], np.float64)
    found = Detections(np.array([12]), np.array([0]), np.full(1, 0.9, np.float32), boxes)
    diagnosis = diagnose(manifest, found)
    page = report_page("a", {}, manifest, score_detections(manifest, found), found, diagnosis)
    assert diagnosis.suspects
    assert "correct them, change the PNG and the JSON" in page
    assert "corrections" not in page


def text_pixels(picture: Image.Image) -> int:
    """Return the number of black pixels below the captions, which only the names of boxes have."""
    return int((np.asarray(picture)[22:] == 0).all(axis=2).sum())


def test_the_table_of_suspects_has_ids_shards_and_names(right: Manifest, wrong: Manifest) -> None:
    suspects = diagnose(wrong, learned_by_heart(right)).suspects
    table = suspects_table(wrong, suspects)
    annotation = right.index().annotations[0]
    names = [category.name for category in right.categories]
    assert table["annotation_id"][0] == annotation["annotation_id"]
    assert (table["kind"][0], table["found_label"][0]) == ("class", names[annotation["label"]])
    assert table["shard"][0] == right.shards[0].name
    assert set(map(len, table.values())) == {len(suspects)}
    assert suspects_table(wrong, ()) == {}


def test_confusions_are_listed_by_name_the_most_frequent_first(right: Manifest, wrong: Manifest) -> None:
    found = learned_by_heart(right)
    pairs = confused_pairs(wrong, diagnose(wrong, found.take(found.scores >= 0.5)))
    names = [category.name for category in right.categories]
    true = right.index().annotations["label"][0]
    assert (pairs["truth"], pairs["found"], pairs["count"]) == (
        [names[(true + 1) % len(names)]],
        [names[true]],
        [1],
    )


def test_the_page_stands_alone_and_escapes_names(right: Manifest, wrong: Manifest) -> None:
    categories = tuple(Category(category.id, "<script>alert(1)</script>") for category in wrong.categories)
    evil = msgspec.structs.replace(wrong, categories=categories)
    evil = with_labels(evil, wrong.index())
    found = learned_by_heart(right)
    page = report_page("a <b>", {"data": "x & y"}, evil, score_detections(evil, found), found, diagnose(evil, found))
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "<h1>a &lt;b&gt;</h1>" in page
    assert "http" not in page
    assert page.count('src="data:image/') == page.count("<img") > 4
    assert "wrong class" in page
