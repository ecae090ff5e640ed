"""The report of a run stands alone: progress, detections, classes, reasons and configuration in one page."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.history import Evaluated, add
from pipeline.config import RunConfig
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.training.explaining import explain
from pipeline.training.run_report import ReportedRun
from shards.dataset.manifest import load_manifest
from shards.score.coco_eval import score_detections
from tests.support.labelled import learned_by_heart
from tests.support.tracker import MemoryTracker


def reported(config: RunConfig, root: Path, reasons: bool = True) -> str:
    val, tracker = load_manifest(config.data.val), MemoryTracker()
    found = learned_by_heart(val)
    evaluation = Evaluation(score_detections(val, found), found, np.arange(val.images))
    run = ReportedRun(config, load_manifest(config.data.train), val, root, "f28a0d6", lambda step: step / 3)
    explain(tracker, val, evaluation, 6, reasons, run)
    content, step = tracker.files["report.html"]
    assert step == 6
    return content.decode()


def test_the_page_has_progress_detections_classes_reasons_and_configuration(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, seed=7)
    add(tmp_path, Evaluated(3, 1.0, {"AP": 0.1, "AP50": 0.2}, 5.0))
    add(tmp_path, Evaluated(9, 3.0, {"AP": 0.1}, 5.0))  # of an attempt that is repeated
    page = reported(config, tmp_path)
    titles = [piece.partition("</h2>")[0] for piece in page.split("<h2>")[1:]]
    assert titles == [
        *("Progress", "Detections", "Score", "What AP50 loses", "Classes", "Worst images", "Suspect labels"),
        "Configuration",
    ]
    assert "at epoch 2</h1>" in page
    assert "commit f28a0d6" in page
    assert "<td>seed<td" in page.replace("</td>", "")
    assert "http" not in page.partition("<pre>")[0].replace("http://www.w3.org", "")
    assert "<script" not in page


def test_without_reasons_the_page_has_the_rest(tiny_config: RunConfig, tmp_path: Path) -> None:
    page = reported(tiny_config, tmp_path, reasons=False)
    assert "<h2>Classes</h2>" in page
    assert "<h2>Worst images</h2>" not in page


@pytest.mark.parametrize("pictures", [0, 2])
def test_the_sheet_of_detections_can_be_left_out(tiny_config: RunConfig, tmp_path: Path, pictures: int) -> None:
    config = replace(tiny_config, evaluate=replace(tiny_config.evaluate, pictures=pictures))
    assert ("<h2>Detections</h2>" in reported(config, tmp_path, reasons=False)) == bool(pictures)
