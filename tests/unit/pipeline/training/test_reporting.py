"""Pictures of an evaluation, and a store of the validation images that does not answer."""

import logging
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.training import reporting
from pipeline.training.reporting import report_pictures
from shards.dataset.manifest import load_manifest
from shards.score.detections import Detections
from shards.store.retry import StoreError
from tests.support.tracker import MemoryTracker


def test_a_store_that_is_away_costs_the_pictures_and_not_the_run(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any) -> None:
        raise StoreError("s3://val/shard-0.tar: no good answer")

    val, tracker = load_manifest(tiny_config.data.val), MemoryTracker()
    report_pictures(tracker, val, Detections.empty(), 2, 5, "a title")
    assert [step for _, step in tracker.pictures] == [5]
    monkeypatch.setattr(reporting, "picture_sheet", away)
    with caplog.at_level(logging.WARNING, reporting.LOG.name):
        report_pictures(tracker, val, Detections.empty(), 2, 6, "a title")
    assert [step for _, step in tracker.pictures] == [5]
    assert "the pictures of step 6 are left out (s3://val/shard-0.tar: no good answer)" in caplog.text
