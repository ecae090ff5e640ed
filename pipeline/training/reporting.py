"""Reports to the tracker besides the curves: evaluations, pictures, warnings, and skipped images."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.checkpoint_store import Location
from pipeline.config import RunConfig
from pipeline.curves import curves_picture, curves_table
from pipeline.evaluate import Evaluation
from pipeline.parallel import Ranks
from pipeline.pictures import detection_pictures
from pipeline.track import TAG_LEFT_OUT, TAG_WARNING, Tracker
from shards.bad_samples import bad_samples
from shards.curves import UNSCORED, Curves
from shards.detections import Detections
from shards.manifest import Manifest

_WARNING_LOGGERS = ("shards", "pipeline.checkpoint")


def tell_evaluation(
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
    _tell_curves(tracker, *curves, step)


def tell_opening(config: RunConfig, tracker: Tracker, val: Manifest) -> None:
    """Report ground-truth images and empty curves at step 0, where MLflow's slider starts."""
    tell_pictures(tracker, val, Detections.empty(config.model.masks), config.evaluate.pictures, 0)
    _tell_curves(tracker, UNSCORED, UNSCORED if config.model.masks else None, 0)


def _tell_curves(tracker: Tracker, boxes: Curves, masks: Curves | None, step: int) -> None:
    tracker.picture("curves/precision_recall", curves_picture(boxes, masks), step)


def tell_pictures(tracker: Tracker, val: Manifest, detections: Detections, count: int, step: int) -> None:
    """Report `count` validation images with the detections beside the ground truth."""
    for number, picture in enumerate(detection_pictures(val, detections, count)):
        tracker.picture(f"detections/{number}", picture, step)


@contextmanager
def telling_warnings(tracker: Tracker) -> Iterator[None]:
    """Report warnings about data and checkpoints in the block as a tag of the run: Ray keeps the workers' logs."""
    handler, loggers = _Teller(tracker), [logging.getLogger(name) for name in _WARNING_LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Teller(logging.Handler):
    """Log handler that reports warnings to a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(logging.WARNING)
        self._tracker = tracker

    def emit(self, record: logging.LogRecord) -> None:
        """Set the warning tag of the run."""
        self._tracker.tags({TAG_WARNING: record.getMessage()[:500]})


def tell_left_out(tracker: Tracker | None, train: Manifest, ranks: Ranks) -> None:
    """Report the training images that any rank has skipped; a collective call."""
    lines: set[str] = set().union(*ranks.gather(bad_samples(train).lines()))
    if lines and tracker:
        tracker.tags({TAG_LEFT_OUT: f"{len(lines)} training images: {'; '.join(sorted(lines))}"[:5000]})
