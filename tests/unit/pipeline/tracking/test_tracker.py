"""The rule that no step is reported twice, and warnings as a tag."""

import logging
import math

from pipeline.tracking.tags import TAG_WARNING
from pipeline.tracking.tracker import ReportedSteps, forward_warnings
from tests.support.tracker import MemoryTracker


def test_the_memory_tracker_drops_repeated_steps() -> None:
    tracker = MemoryTracker()
    tracker.metrics({"train/loss": 1.0}, 10)
    tracker.metrics({"train/loss": 2.0}, 10)
    tracker.metrics({"train/loss": math.nan}, 11)
    tracker.checkpoint("/c", 5, {"val/AP": 0.5})
    assert tracker.points == [("train/loss", 1.0, 10), ("val/AP", 0.5, 5)]
    assert tracker.checkpoints == [("/c", 5)]


def test_events_of_two_attempts_may_have_the_same_step() -> None:
    tracker = MemoryTracker()
    for workers in (4, 2, 1):
        tracker.metrics({"workers/number": float(workers), "train/loss": float(workers)}, 101)
        if workers < 4:
            tracker.metrics({"restart/seconds": 10.0 * workers}, 101)
    assert [point for point in tracker.points if point[0] != "train/loss"] == [
        ("workers/number", 4.0, 101),
        ("workers/number", 2.0, 101),
        ("restart/seconds", 20.0, 101),
        ("workers/number", 1.0, 101),
        ("restart/seconds", 10.0, 101),
    ]
    assert [point for point in tracker.points if point[0] == "train/loss"] == [("train/loss", 4.0, 101)]


def test_a_table_of_an_earlier_step_is_dropped() -> None:
    tracker = MemoryTracker()
    for step in (2, 3, 1, 3):
        tracker.table("t.json", {"step": [step]}, step)
    assert tracker.tables == {"t.json": {"step": [3]}}


def test_with_any_order_only_reported_steps_are_dropped() -> None:
    reported = ReportedSteps(any_order=True)
    assert reported.new_values({"val/AP": 0.5}, 7) == {"val/AP": 0.5}
    assert reported.new_values({"val/AP": 0.5}, 7) == {}
    assert reported.new_values({"val/AP": 0.4, "val/AP50": math.nan}, 3) == {"val/AP": 0.4}


def test_warnings_about_data_are_reported_inside_the_block() -> None:
    tracker, logger = MemoryTracker(), logging.getLogger("shards.store.retry")
    with forward_warnings(tracker):
        logger.warning("%s does not answer", "s3://shards")
        logger.info("fetched")
    assert tracker.last_tags == {TAG_WARNING: "s3://shards does not answer"}
    logger.warning("later")
    assert tracker.last_tags == {TAG_WARNING: "s3://shards does not answer"}
