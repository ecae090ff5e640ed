"""A run with masks on panoptic data, in this process: what it reports beside that of a detector."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint import catalog
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.tracking.pages.pictures import DETECTIONS, REPORT
from pipeline.training.loop import run
from tests.support.panoptic_data import make_panoptic
from tests.support.runs import start
from tests.support.tracker import MemoryTracker


def test_a_run_with_masks_on_panoptic_data_reports_pq_its_classes_and_its_errors(
    masks_config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_panoptic(tmp_path / "data").write().url
    config = replace(
        masks_config,
        data=replace(masks_config.data, train=data, val=data),
        optim=replace(masks_config.optim, batch_size=3, epochs=1),
    )
    run_info, tracker = start(config, tmp_path / "run"), MemoryTracker()
    with caplog.at_level(logging.WARNING):
        run(config, run_info, Ranks(), tracker)
    assert not caplog.records, caplog.text
    metrics = catalog.read_evaluation(catalog.folder_of(run_info.folder, 1))
    assert metrics is not None
    points = {name: value for name, value, step in tracker.points if step == 1}
    for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff"):
        assert points[f"val/{name}"] == metrics[name]
    assert points["At_a_glance/PQ"] == metrics["PQ"]
    assert points["val/AP"] == metrics["AP"]
    assert "mask_AP" not in metrics
    assert points["train/loss_mask"] > 0
    assert tracker.tables["per_class_pq.json"]["name"] == ["person", "car", "grass", "sky"]
    assert sum(tracker.tables["per_class_pq.json"]["missed"]) > 0  # it has learned nothing
    gains = {name: value for name, value in points.items() if name.startswith("errors/PQ_")}
    assert gains["errors/PQ_missed"] == max(gains.values()) > 0
    assert {("errors/PQ", 1), (DETECTIONS, 1)} <= set(tracker.pictures)
    page = tracker.files[REPORT][0].decode()
    assert "<h2>Segments</h2>" in page
    assert ": PQ " in page
