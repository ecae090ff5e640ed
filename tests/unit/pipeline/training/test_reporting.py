"""Reports of an evaluation and of the hardware."""

import io
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.tracking.pages.pictures import newest, newest_small
from pipeline.tracking.tags import TAG_HARDWARE, TAG_VERSIONS
from pipeline.training import reporting
from pipeline.training.reporting import report_evaluation, report_hardware, report_picture
from shards.dataset.manifest import load_manifest
from shards.score.coco_eval import score_detections
from shards.store.retry import StoreError
from tests.support.labelled import learned_by_heart
from tests.support.tiny_data import TinyData
from tests.support.tracker import MemoryTracker


def test_a_figure_that_is_not_defined_is_no_point_of_a_curve(tiny_data: TinyData) -> None:
    val, tracker = load_manifest(tiny_data.val), MemoryTracker()
    found = learned_by_heart(val)
    evaluation = Evaluation(score_detections(val, found), found, np.arange(val.images))
    assert evaluation.score.metrics["APl"] < 0  # the images are small
    report_evaluation(tracker, Path("/c"), val, 3, 1.0, evaluation, 0.0)
    values = {name: value for name, value, _ in tracker.points}
    assert "val/APl" not in values
    assert min(value for name, value in values.items() if name.startswith("val/")) >= 0
    assert values["At_a_glance/AP"] == values["val/AP"]
    assert list(tracker.tables["per_class_ap.json"])[:2] == ["name", "AP"]


@pytest.mark.parametrize(("step", "series"), [(0, []), (3, [("a/b", 3)])])
def test_the_newest_picture_of_a_series_is_an_artifact_too(step: int, series: list[tuple[str, int]]) -> None:
    tracker = MemoryTracker()
    report_picture(tracker, "a/b", Image.new("RGB", (2000, 1000), "red"), step)
    assert tracker.pictures == series
    sizes = []
    for name in (newest("a/b"), newest_small("a/b")):
        content, at = tracker.files[name]
        with Image.open(io.BytesIO(content)) as picture:
            sizes.append((picture.format, picture.size, at))
    assert sizes == [("PNG", (2000, 1000), step), ("WEBP", (620, 310), step)]


def test_the_hardware_and_versions_of_a_run_are_tags() -> None:
    tracker = MemoryTracker()
    report_hardware(tracker, Ranks())
    assert tracker.last_tags[TAG_HARDWARE].startswith("1 worker, ")
    assert {"Python", "torch", "numpy"} <= {entry.split()[0] for entry in tracker.last_tags[TAG_VERSIONS].split(", ")}


def test_a_store_that_is_away_costs_the_pictures_and_not_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def away(_: int) -> Image.Image:
        raise StoreError("s3://val/shard-0.tar: no good answer")

    tracker = MemoryTracker()
    with caplog.at_level(logging.WARNING, reporting.LOG.name):
        reporting.report_pictures(tracker, away, 2, 6, "a title")
    assert tracker.pictures == []
    assert "the pictures of step 6 are left out (s3://val/shard-0.tar: no good answer)" in caplog.text
