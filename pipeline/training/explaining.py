"""Explanation of a run's evaluations, and the run's report, beside the training: it may be late, and it never stops a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from types import TracebackType

from PIL import Image

from detr.variant import DETR
from pipeline.display.attention import attention_figures, attention_section
from pipeline.display.draw import contact_sheet
from pipeline.display.explanation import (
    columns,
    confused_pairs,
    suspect_pictures,
    suspects_table,
    worst_pictures,
)
from pipeline.display.report import Drawn
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.tracking.pages.pictures import REPORT
from pipeline.tracking.tracker import Tracker
from pipeline.training.reporting import report_picture
from pipeline.training.run_report import ReportedRun
from shards.dataset.manifest import Manifest
from shards.errors import one_line
from shards.score.diagnosis import Diagnosis, diagnose

LOG = logging.getLogger(__name__)
_AFTER_ERROR_S = 10.0
_COLUMNS, _WIDTH = 3, 1440  # of a sheet of pictures, in pairs and pixels


def report_explanation(tracker: Tracker, val: Manifest, diagnosis: Diagnosis, drawn: Drawn, step: int) -> None:
    """Report the reasons of the score of an evaluation as curves, tables and pictures."""
    figures = {f"errors/{name}": cost for name, cost in diagnosis.errors.items()}
    figures["calibration/error"] = diagnosis.calibration_error
    # MLflow refuses a plus sign in a name.
    figures |= {
        f"objects/AP50_{entry.objects.replace('+', '_or_more')}": entry.ap50
        for entry in diagnosis.by_objects
        if entry.images
    }
    tracker.metrics(figures, step)
    tables = {
        "confusion.json": confused_pairs(val, diagnosis),
        "calibration.json": columns(diagnosis.calibration),
        "worst_images.json": columns(diagnosis.worst),
        "suspect_labels.json": suspects_table(val, diagnosis.suspects),
    }
    for name, table in tables.items():
        tracker.table(name, table, step)
    _report_sheet(tracker, "errors/worst_images", drawn.worst, step)
    _report_sheet(tracker, "errors/suspect_labels", drawn.suspects, step)


def _report_sheet(tracker: Tracker, key: str, pictures: Sequence[Image.Image], step: int) -> None:
    if pictures:
        report_picture(tracker, key, contact_sheet(pictures, _COLUMNS, _WIDTH), step)


class Explainer:
    """Thread that explains evaluations on rank 0, one after the other, while all ranks train on.

    What a kill interrupts is not explained: the next evaluation is, or `detr evaluate --report` on the version.
    """

    def __init__(self, tracker: Tracker | None, val: Manifest, enabled: bool, run: ReportedRun | None = None) -> None:
        self._tracker, self._val, self._enabled, self._run = tracker, val, enabled, run
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Explainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the explanation of the last evaluation; after an error only for seconds, since a restart waits too."""
        if self._thread is not None and kind is not None:
            self._thread.join(_AFTER_ERROR_S)
        else:
            self._wait()

    def start(self, evaluation: Evaluation, step: int, model: DETR | None = None) -> None:
        """Explain an evaluation when the one before is explained; nobody else uses `model`, which was scored."""
        if self._tracker is None:
            return
        self._wait()
        arguments = (self._tracker, self._val, evaluation, step, self._enabled, self._run, model)
        self._thread = threading.Thread(target=explain, args=arguments, name="explainer", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread = None


def explain(
    tracker: Tracker,
    val: Manifest,
    evaluation: Evaluation,
    step: int,
    reasons: bool = True,
    run: ReportedRun | None = None,
    model: DETR | None = None,
) -> None:
    """Report the reasons of a score, and the page of the run, or log why that is impossible: no run ends because of it."""
    diagnosis = drawn = None
    attention = ""
    try:
        if reasons:
            diagnosis = diagnose(val, evaluation.detections, rows=evaluation.rows)
            drawn = Drawn(
                list(worst_pictures(val, evaluation.detections, diagnosis)),
                list(suspect_pictures(val, diagnosis.suspects)),
            )
            report_explanation(tracker, val, diagnosis, drawn, step)
            if run and model is not None:
                names = [category.name for category in run.train.categories]
                figures = attention_figures(model, run.config.transform, names, val, diagnosis)
                _report_sheet(tracker, "errors/attention", [figure.picture for figure in figures], step)
                attention = attention_section(model, figures)
        if run:
            tracker.file(REPORT, run.page(evaluation, step, diagnosis, drawn, attention).encode(), step)
    except Exception as error:
        LOG.warning("the evaluation of step %d is not explained (%s)", step, one_line(error))
