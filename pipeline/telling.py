"""What a run tells its tracker beside the curves: evaluations, pictures, and images that are left out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import checkpoint
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


def tell_evaluation(
    tracker: Tracker, path: Location, step: int, epoch: float, evaluation: Evaluation, started: float
) -> None:
    """The figures of the checkpoint at `path`; started: when its evaluation began, as `time.perf_counter` says."""
    metrics, classes = evaluation.score.metrics, evaluation.score.classes
    # In one event, so that who reads the store never sees this epoch beside the figures of the one before.
    figures = {f"val/{name}": value for name, value in metrics.items()}
    figures |= {"evaluation/seconds": time.perf_counter() - started, "evaluation/epoch": epoch}
    figures["evaluation/images"] = float(evaluation.images)
    tracker.checkpoint(str(path), step, figures)
    columns: dict[str, list[Any]] = {
        "category_id": [one.category_id for one in classes],
        "name": [one.name for one in classes],
        "AP": [one.ap for one in classes],
        "AP50": [one.ap50 for one in classes],
        "boxes": [one.boxes for one in classes],
    }
    if "mask_AP" in metrics:
        columns |= {"mask_AP": [one.mask_ap for one in classes], "mask_AP50": [one.mask_ap50 for one in classes]}
    tracker.table("per_class_ap.json", columns, step)
    curves = (evaluation.score.curves, evaluation.score.mask_curves)
    tracker.table("precision_recall.json", curves_table(*curves), step)
    _tell_curves(tracker, *curves, step)


def tell_opening(config: RunConfig, tracker: Tracker, val: Manifest) -> None:
    """What is known at step 0, where the slider of MLflow opens: the truth, and curves without lines."""
    tell_pictures(tracker, val, Detections.empty(config.model.masks), config.evaluate.pictures, 0)
    _tell_curves(tracker, UNSCORED, UNSCORED if config.model.masks else None, 0)


def _tell_curves(tracker: Tracker, boxes: Curves, masks: Curves | None, step: int) -> None:
    tracker.picture("curves/precision_recall", curves_picture(boxes, masks), step)


def tell_pictures(tracker: Tracker, val: Manifest, detections: Detections, count: int, step: int) -> None:
    """Some validation images with the detections next to the truth."""
    for number, picture in enumerate(detection_pictures(val, detections, count)):
        tracker.picture(f"detections/{number}", picture, step)


@contextmanager
def telling_warnings(tracker: Tracker) -> Iterator[None]:
    """Whatever the data plane and the checkpoints warn of in the block is said with the run: Ray keeps workers' logs."""
    handler, loggers = _Teller(tracker), (logging.getLogger("shards"), checkpoint.LOG)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Teller(logging.Handler):
    def __init__(self, tracker: Tracker) -> None:
        super().__init__(logging.WARNING)
        self._tracker = tracker

    def emit(self, record: logging.LogRecord) -> None:
        self._tracker.tags({TAG_WARNING: record.getMessage()[:500]})


def tell_left_out(tracker: Tracker | None, train: Manifest, ranks: Ranks) -> None:
    """Images that are not trained on are said with the run, not only in a worker's log; a collective call."""
    lines = {line for of_rank in ranks.gather(bad_samples(train).lines()) for line in of_rank}
    if lines and tracker:
        tracker.tags({TAG_LEFT_OUT: f"{len(lines)} training images: {'; '.join(sorted(lines))}"[:5000]})
