"""Reports to the tracker besides the curves: evaluations, pictures, warnings, and skipped images."""

from __future__ import annotations

import time
from typing import Any

from pipeline.checkpoint.location import Location
from pipeline.config import RunConfig
from pipeline.display.pictures import curves_picture, curves_table, detection_pictures
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.tracking.tags import TAG_LEFT_OUT
from pipeline.tracking.tracker import Tracker
from shards.dataset.manifest import Manifest
from shards.read.bad_samples import BadSamples
from shards.score.detections import Detections
from shards.score.precision_recall import UNSCORED

_CURVES = "curves/precision_recall"


def report_evaluation(
    tracker: Tracker, path: Location, step: int, epoch: float, evaluation: Evaluation, started: float
) -> None:
    """Report the metrics of a checkpoint; `started` is the `time.perf_counter` at the start of the evaluation."""
    metrics, classes = evaluation.score.metrics, evaluation.score.classes
    # In one event, so that no reader of the store sees this epoch with the metrics of an earlier one.
    figures = {f"val/{name}": value for name, value in metrics.items()}
    figures |= {"evaluation/seconds": time.perf_counter() - started, "evaluation/epoch": epoch}
    figures["evaluation/images"] = float(evaluation.images)
    tracker.checkpoint(str(path), step, figures)
    columns: dict[str, list[Any]] = {
        "category_id": [score.category_id for score in classes],
        "name": [score.name for score in classes],
        "AP": [score.ap for score in classes],
        "AP50": [score.ap50 for score in classes],
        "boxes": [score.boxes for score in classes],
    }
    if "mask_AP" in metrics:
        columns |= {
            "mask_AP": [score.mask_ap for score in classes],
            "mask_AP50": [score.mask_ap50 for score in classes],
        }
    tracker.table("per_class_ap.json", columns, step)
    curves = (evaluation.score.curves, evaluation.score.mask_curves)
    tracker.table("precision_recall.json", curves_table(*curves), step)
    tracker.picture(_CURVES, curves_picture(*curves), step)


def report_opening(config: RunConfig, tracker: Tracker, val: Manifest) -> None:
    """Report ground-truth images and empty curves at step 0, where MLflow's slider starts."""
    report_pictures(tracker, val, Detections.empty(config.model.masks), config.evaluate.pictures, 0)
    tracker.picture(_CURVES, curves_picture(UNSCORED, UNSCORED if config.model.masks else None), 0)


def report_pictures(tracker: Tracker, val: Manifest, detections: Detections, count: int, step: int) -> None:
    """Report `count` validation images with the detections beside the ground truth."""
    for number, picture in enumerate(detection_pictures(val, detections, count)):
        tracker.picture(f"detections/{number}", picture, step)


def report_left_out(tracker: Tracker | None, bad: BadSamples, ranks: Ranks) -> None:
    """Report the training images that any rank has skipped; a collective call."""
    lines: set[str] = set().union(*ranks.all_gather(bad.lines()))
    if lines and tracker:
        tracker.tags({TAG_LEFT_OUT: f"{len(lines)} training images: {'; '.join(sorted(lines))}"[:5000]})
