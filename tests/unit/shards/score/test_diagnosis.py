"""Reasons of a score, on detections whose errors are known."""

from dataclasses import replace

import numpy as np
import pytest

from shards.score.detections import Detections
from shards.score.diagnosis import ERROR_KINDS, diagnose
from tests.support.detections import truth_itself
from tests.support.labelled import labelled

GRID = [(x, y, 60.0, 60.0) for y in (20.0, 220.0) for x in (20.0, 220.0)]


@pytest.fixture
def data():
    """Forty images with four objects, far apart, of three classes."""
    return labelled([[((image + number) % 3, *box) for number, box in enumerate(GRID)] for image in range(40)])


def exact(data):
    return replace(truth_itself(data), scores=np.full(160, 0.6, np.float32))


def third(found):
    return np.arange(len(found)) % 16 < 5  # of every class


def added(found, boxes, score):
    extra = replace(found, boxes_xywh=boxes, scores=np.full(len(found), score, np.float32))
    return Detections.concatenate([found, extra])


def with_errors(found, kind):
    at, shift = third(found), np.array([30.0, 0, 0, 0])
    if kind == "class":
        return replace(found, labels=np.where(at, (found.labels + 1) % 3, found.labels))
    if kind == "box":
        return replace(found, boxes_xywh=found.boxes_xywh + at[:, None] * shift)
    if kind == "class_and_box":
        return with_errors(with_errors(found, "class"), "box")
    if kind == "background":
        return added(found, found.boxes_xywh + np.array([100, 0, 0, 0]), 0.9)
    return found.take(~at)


@pytest.mark.parametrize("kind", ["class", "box", "background", "missed"])
def test_the_planted_kind_of_error_costs_the_most(data, kind):
    diagnosis = diagnose(data, with_errors(exact(data), kind))
    assert tuple(diagnosis.errors) == tuple(ERROR_KINDS)
    assert max(diagnosis.errors, key=diagnosis.errors.get) == kind
    assert diagnosis.errors[kind] > 0.1
    assert diagnosis.error_counts[kind] == (160 if kind == "background" else 50)


def test_an_error_of_class_and_box_leaves_its_object_missed(data):
    diagnosis = diagnose(data, with_errors(exact(data), "class_and_box"))
    assert (diagnosis.error_counts["class_and_box"], diagnosis.error_counts["missed"]) == (50, 50)
    assert diagnosis.error_counts["class"] == diagnosis.error_counts["box"] == 0


def test_duplicates_cost_what_they_take_from_later_objects(data):
    found = exact(data)
    low = replace(found, scores=np.where(third(found), 0.4, 0.6).astype(np.float32))
    again = replace(found, scores=np.full(160, 0.5, np.float32)).take(~third(found))
    diagnosis = diagnose(data, Detections.concatenate([low, again]))
    assert diagnosis.error_counts["duplicate"] == 110
    assert max(diagnosis.errors, key=diagnosis.errors.get) == "duplicate"


def test_no_error_costs_anything_and_there_is_nothing_to_show(data):
    diagnosis = diagnose(data, exact(data))
    assert set(diagnosis.errors.values()) == {0.0}
    assert diagnosis.ap50 == pytest.approx(1)
    assert diagnosis.suspects == ()
    assert {worst.missed + worst.false for worst in diagnosis.worst} == {0}  # the scores are not 1


def test_confused_classes_are_counted_by_true_and_found_label(data):
    found = exact(data)
    changed = third(found) & (found.labels == 0)
    found = replace(found, labels=np.where(changed, 2, found.labels))
    confusion = diagnose(data, found.take(found.labels != 1)).confusion
    assert confusion[0, 2] == changed.sum()
    assert confusion[1].tolist() == [0, 0, 0, (exact(data).labels == 1).sum()]  # found as nothing
    assert np.trace(confusion) == confusion[0, 0] + confusion[2, 2]


def test_detections_of_low_score_are_not_confused(data):
    found = exact(data)
    assert diagnose(data, replace(found, scores=found.scores - 0.2)).confusion[:3, :3].sum() == 0


def test_calibration_compares_scores_with_the_share_of_correct_detections(data):
    diagnosis = diagnose(data, with_errors(exact(data), "class"))
    (group,) = diagnosis.calibration
    assert (group.score, group.count) == (pytest.approx(0.6), 160)
    assert group.correct == pytest.approx(1 - 50 / 160)
    assert diagnosis.calibration_error == pytest.approx(group.correct - group.score)


def test_ap_by_number_of_objects():
    data = labelled([[(0, *GRID[0])], [(0, *box) for box in GRID[:3]], [(0, *box) for box in GRID], []])
    found = truth_itself(data)
    found = found.take(found.image_ids != 100)  # nothing in the image of one object
    shown = {entry.objects: (entry.images, entry.ap50) for entry in diagnose(data, found).by_objects}
    assert shown["1"] == (1, 0)
    assert shown["2-4"] == (2, pytest.approx(1))
    assert shown["20+"] == (0, -1)


def test_the_best_images_have_the_most_objects_found_with_high_scores(data):
    found = exact(data)
    images = data.index().rows_of(found.image_ids)
    scores = np.where(np.isin(images, [7, 21]), 0.9, 0.6).astype(np.float32)
    found = replace(found, scores=scores).take(np.arange(160) != np.flatnonzero(images == 21)[0])
    assert [image.image_id for image in diagnose(data, found, best=2).best] == [107, 121]
    assert diagnose(data, Detections.empty()).best == ()


def test_the_worst_image_has_the_most_errors(data):
    found = exact(data)
    ruined, bad = found.image_ids == 107, (found.image_ids == 113) & third(found)
    found = replace(
        found, labels=np.where(ruined | bad, (found.labels + 1) % 3, found.labels), scores=found.scores + 0.4
    )
    first, second = diagnose(data, found, worst=2).worst
    assert (first.image_id, first.objects, first.found, first.missed, first.false) == (107, 4, 0, 4, 4)
    assert (second.image_id, second.missed) == (113, 1)
    assert first.shard == "shard-000000.tar"


def test_detections_in_a_crowd_are_no_errors(data):
    index = data.index()
    index.annotations["iscrowd"][0] = 1
    index.annotations["bbox"][0] = (0, 0, 200, 200)
    found = replace(truth_itself(data), scores=np.ones(159, np.float32))
    inside = replace(
        found.take([0, 0]), labels=np.zeros(2, np.int64), boxes_xywh=np.array([[5.0, 5, 30, 30], [50, 90, 20, 20]])
    )
    found = Detections.concatenate([found, inside])
    diagnosis = diagnose(data, found)
    assert diagnosis.worst == ()
    assert diagnosis.suspects == ()


def test_only_the_images_asked_for_are_explained(data):
    found = exact(data)
    rows = np.array([3, 5])
    kept = found.take(np.isin(found.image_ids, [103, 105]))
    assert diagnose(data, kept.take(kept.image_ids == 103), rows=rows).error_counts["missed"] == 4
