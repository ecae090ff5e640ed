"""Reasons of a run's scores, reported beside the training."""

import logging
import threading
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from PIL import Image

from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.training import explaining
from pipeline.training.explaining import Explainer, explain
from shards.dataset.manifest import Manifest, load_manifest
from shards.score.coco_eval import score_detections
from shards.score.diagnosis import ERROR_KINDS
from tests.support.labelled import learned_by_heart
from tests.support.tiny_data import TinyData
from tests.support.tracker import MemoryTracker


@pytest.fixture
def val(tiny_data: TinyData) -> Manifest:
    return load_manifest(tiny_data.val)


@pytest.fixture
def evaluation(val: Manifest) -> Evaluation:
    found = learned_by_heart(val)
    return Evaluation(score_detections(val, found), found, np.arange(val.images))


def test_every_evaluation_gets_curves_tables_and_pictures(val: Manifest, evaluation: Evaluation) -> None:
    tracker = MemoryTracker()
    with Explainer(tracker, val, enabled=True) as explainer:
        for step in (3, 6):
            explainer.start(evaluation, step)
    names = {name for name, _, _ in tracker.points}
    assert {f"errors/{kind}" for kind in ERROR_KINDS} | {"calibration/error"} <= names
    assert any(name.startswith("objects/AP50_") for name in names)
    assert [step for name, _, step in tracker.points if name == "errors/missed"] == [3, 6]
    assert tracker.tables.keys() == {
        "confusion.json",
        "calibration.json",
        "worst_images.json",
        "suspect_labels.json",
    }
    assert sorted(tracker.pictures) == [
        (f"errors/{name}", step) for name in ("suspect_labels", "worst_images") for step in (3, 6)
    ]


class SlowTracker(MemoryTracker):
    """Tracker whose curves wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.go = threading.Event(), threading.Event()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self.begun.set()
        assert self.go.wait(60)
        super().metrics(values, step)


def test_training_does_not_wait_for_an_explanation_but_the_end_of_the_run_does(
    val: Manifest, evaluation: Evaluation
) -> None:
    tracker = SlowTracker()
    with Explainer(tracker, val, enabled=True) as explainer:
        explainer.start(evaluation, 3)
        assert tracker.points == []
        tracker.go.set()
    assert ("errors/worst_images", 3) in tracker.pictures


def test_no_evaluation_waits_for_an_explanation_and_the_newest_is_explained_next(
    val: Manifest, evaluation: Evaluation
) -> None:
    tracker = SlowTracker()
    with Explainer(tracker, val, enabled=True) as explainer:
        explainer.start(evaluation, 3)
        assert tracker.begun.wait(60)
        for step in (6, 9, 12):  # while that of step 3 is being explained
            explainer.start(evaluation, step)
        tracker.go.set()
    assert [step for name, _, step in tracker.points if name == "errors/missed"] == [3, 12]


class BrokenTracker(MemoryTracker):
    """Tracker that takes no pictures."""

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        raise ValueError("no\npictures")


def test_an_explanation_that_fails_is_a_warning(
    val: Manifest, evaluation: Evaluation, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        explain(BrokenTracker(), val, evaluation, 3)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" ")[0] for message in messages] == ["errors/worst_images", "errors/suspect_labels"]
    assert all("of the evaluation of step 3 is left out (no)" in message for message in messages)


def test_what_fails_costs_itself_only(
    val: Manifest, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> Iterator[Image.Image]:
        yield Image.new("RGB", (8, 8))
        raise OSError("image 4 cannot be decoded")

    monkeypatch.setattr(explaining, "worst_pictures", broken)
    tracker = MemoryTracker()
    with caplog.at_level(logging.WARNING):
        explain(tracker, val, evaluation, 3)
    assert sorted(tracker.pictures) == [("errors/suspect_labels", 3), ("errors/worst_images", 3)]
    assert "confusion.json" in tracker.tables
    (record,) = caplog.records
    assert "a picture of the worst images" in record.getMessage()


@pytest.mark.parametrize("tracker", [None, MemoryTracker()], ids=["other rank", "off"])
def test_nothing_is_explained_on_other_ranks_or_when_it_is_off(
    val: Manifest, evaluation: Evaluation, tracker: MemoryTracker | None
) -> None:
    with Explainer(tracker, val, enabled=tracker is None) as explainer:
        explainer.start(evaluation, 3)
    assert tracker is None or tracker.points == []


def test_only_the_evaluated_images_are_explained(val: Manifest, evaluation: Evaluation) -> None:
    rows = np.array([0, 1])
    ids = val.index().images["image_id"][rows]
    found = evaluation.detections.take(np.isin(evaluation.detections.image_ids, ids))
    tracker = MemoryTracker()
    explain(tracker, val, Evaluation(score_detections(val, found, rows=rows), found, rows), 3)
    assert set(tracker.tables["worst_images.json"]["image_id"]) <= set(ids.tolist())
