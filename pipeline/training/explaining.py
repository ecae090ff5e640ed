"""Explanation of a run's evaluations, and the run's report, beside the training: it may be late, and it never stops a run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
_Scored = tuple[Evaluation, int, DETR | None]
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
    with _left_out(key, step):
        if pictures:
            report_picture(tracker, key, contact_sheet(pictures, _COLUMNS, _WIDTH), step)


@contextmanager
def _left_out(what: str, step: int) -> Iterator[None]:
    """Log why the block has failed: what is beside it is reported all the same."""
    try:
        yield
    except Exception as error:
        LOG.warning("%s of the evaluation of step %d is left out (%s)", what, step, one_line(error))


class Explainer:
    """Thread that explains evaluations on rank 0 while all ranks train on; no evaluation waits for it.

    Of those that end during an explanation the newest is explained next. What a kill interrupts is not explained: the next
    evaluation is, or `detr evaluate --report` on the version.
    """

    def __init__(self, tracker: Tracker | None, val: Manifest, enabled: bool, run: ReportedRun | None = None) -> None:
        self._tracker, self._val, self._enabled, self._run = tracker, val, enabled, run
        self._thread: threading.Thread | None = None
        self._next: _Scored | None = None
        self._lock = threading.Lock()  # of both

    def __enter__(self) -> Explainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for the explanation of the last evaluation; after an error only for seconds, since a restart waits too."""
        thread = self._thread
        if thread is not None:
            thread.join(None if kind is None else _AFTER_ERROR_S)

    def start(self, evaluation: Evaluation, step: int, model: DETR | None = None) -> None:
        """Explain an evaluation, after the one that is being explained; nobody else uses `model`, which was scored."""
        if self._tracker is None:
            return
        with self._lock:
            if self._thread is None:
                arguments = (self._tracker, (evaluation, step, model))
                self._thread = threading.Thread(target=self._explain, args=arguments, name="explainer", daemon=True)
                self._thread.start()
                return
            if self._next is not None:
                LOG.info("the evaluation of step %d is not explained: that of step %d is newer", self._next[1], step)
            self._next = (evaluation, step, model)

    def _explain(self, tracker: Tracker, found: _Scored | None) -> None:
        while found is not None:
            evaluation, step, model = found
            explain(tracker, self._val, evaluation, step, self._enabled, self._run, model)
            with self._lock:
                found, self._next = self._next, None
                if found is None:
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
    if reasons:
        with _left_out("the diagnosis", step):
            diagnosis = diagnose(val, evaluation.detections, rows=evaluation.rows)
    if diagnosis is not None:
        drawn = Drawn(
            _drawn("a picture of the worst images", step, worst_pictures(val, evaluation.detections, diagnosis)),
            _drawn("a picture of suspect labels", step, suspect_pictures(val, diagnosis.suspects)),
        )
        with _left_out("the explanation", step):
            report_explanation(tracker, val, diagnosis, drawn, step)
        if run and model is not None:
            with _left_out("the attention", step):
                names = [category.name for category in run.train.categories]
                figures = attention_figures(model, run.config.transform, names, val, diagnosis)
                _report_sheet(tracker, "errors/attention", [figure.picture for figure in figures], step)
                attention = attention_section(model, figures)
    if run:
        with _left_out("the page", step):
            tracker.file(REPORT, run.page(evaluation, step, diagnosis, drawn, attention).encode(), step)


def _drawn(what: str, step: int, pictures: Iterator[Image.Image]) -> list[Image.Image]:
    """Return the pictures up to the first that fails."""
    found = []
    with _left_out(what, step):
        for picture in pictures:
            found.append(picture)
    return found
