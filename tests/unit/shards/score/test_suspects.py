"""Labels planted wrong are found by a model that knows the right ones."""

from dataclasses import replace

import numpy as np
import pytest

from shards.dataset.index import Index
from shards.score.diagnosis import diagnose
from tests.support.labelled import labelled, learned_by_heart, with_labels, without

GRID = [(x, y, 70.0, 50.0) for y in (20.0, 170.0, 320.0) for x in (20.0, 220.0)]
WRONG = list(range(3, 240, 24))  # ten annotations, each in another image


@pytest.fixture
def data():
    """Forty images with six objects of three classes."""
    return labelled([[((image + number) % 3, *box) for number, box in enumerate(GRID)] for image in range(40)])


def changed(data, field, change):
    annotations = np.array(data.index().annotations)
    annotations[field][WRONG] = change(annotations[field][WRONG])
    return with_labels(data, Index(data.index().images, annotations))


def suspects(data, wrong, count=12):
    """Return the first suspects; two more than are planted, for noise that the model is sure of."""
    return diagnose(wrong, learned_by_heart(data), suspects=count).suspects


def of_kind(found, kind):
    return [suspect for suspect in found if suspect.kind == kind]


def test_swapped_classes_come_first(data):
    wrong = changed(data, "label", lambda labels: (labels + 1) % 3)
    found = of_kind(suspects(data, wrong), "class")
    assert {suspect.annotation_id for suspect in found} == {1000 + number for number in WRONG}
    assert all(suspect.found_label == (suspect.label - 1) % 3 for suspect in found)
    assert all(0.4 < suspect.suspicion <= 1 for suspect in found)


@pytest.mark.parametrize("shift", [(30, 0), (60, 20), (0, 70)], ids=str)
def test_shifted_boxes_come_first(data, shift):
    wrong = changed(data, "bbox", lambda boxes: boxes + np.array([*shift, 0, 0]))
    found = of_kind(suspects(data, wrong), "box")
    assert {suspect.annotation_id for suspect in found} == {1000 + number for number in WRONG}


def test_an_error_that_the_model_makes_often_is_no_suspicion(data):
    """Half of a class is found as another: then a label that is found so is more likely right."""
    found = learned_by_heart(data)
    half = (found.labels == 0) & (np.arange(len(found)) % 2 == 0)
    confused = replace(found, labels=np.where(half, 2, found.labels))
    wrong = changed(data, "label", lambda labels: np.where(labels == 1, 0, labels))  # found as class 1
    first, *_ = of_kind(diagnose(wrong, confused).suspects, "class")
    usual = [
        entry.suspicion for entry in diagnose(wrong, confused).suspects if (entry.label, entry.found_label) == (0, 2)
    ]
    assert (first.label, first.found_label) == (0, 1)
    assert max(usual, default=0) < 0.2 < first.suspicion


def test_missing_boxes_come_first(data):
    right = data.index().annotations["bbox"][WRONG]
    found = suspects(data, without(data, WRONG), 10)
    assert {suspect.kind for suspect in found} == {"missing"}
    assert len({suspect.image_id for suspect in found}) == 10
    ordered = sorted(found, key=lambda suspect: suspect.image_id)
    np.testing.assert_allclose([suspect.found_box_xywh for suspect in ordered], right, atol=6)
    assert {suspect.annotation_id for suspect in found} == {None}


def test_labels_of_nothing_come_first(data):
    extra = labelled(
        [
            [((image + number) % 3, *box) for number, box in enumerate(GRID)]
            + [(1, 330.0, 330.0, 60.0, 60.0)] * (image % 4 == 0)
            for image in range(40)
        ]
    )
    found = suspects(data, extra)
    spurious = of_kind(found, "spurious")
    assert len(spurious) == 10
    assert {(suspect.box_xywh, suspect.score) for suspect in spurious} == {((330, 330, 60, 60), None)}


def test_an_object_detected_several_times_is_one_suspect(data):
    found = learned_by_heart(data)
    twice = found.take(np.concatenate([np.arange(len(found)), np.arange(240)]))
    missing = [suspect for suspect in diagnose(without(data, WRONG), twice).suspects if suspect.kind == "missing"]
    assert len([suspect for suspect in missing if suspect.score > 0.75]) == 10


def test_a_label_that_the_model_finds_too_is_no_suspect(data):
    assert all(suspect.suspicion < 0.5 for suspect in suspects(data, data))
