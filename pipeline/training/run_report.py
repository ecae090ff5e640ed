"""The report of a run, made anew from each of its evaluations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from pipeline.checkpoint.history import Evaluated, read_history
from pipeline.checkpoint.location import Location
from pipeline.config import RunConfig
from pipeline.display.pictures import evaluation_sheet
from pipeline.display.report import Drawn, report_page
from pipeline.display.run_report import (
    REMEDY,
    configuration_section,
    detections_section,
    progress_section,
    segments_section,
)
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.figures import deciding_text
from shards.dataset.manifest import Manifest
from shards.score.diagnosis import Diagnosis


@dataclass(frozen=True)
class ReportedRun:
    """Constant facts of a run for its reports."""

    config: RunConfig
    train: Manifest
    val: Manifest
    root: Location
    """Location of the run's checkpoints."""
    code_commit: str
    epoch: Callable[[int], float]
    """Return the epoch, with fraction, at a step."""

    def page(
        self,
        evaluation: Evaluation,
        step: int,
        diagnosis: Diagnosis | None,
        drawn: Drawn | None,
        attention: str = "",
    ) -> str:
        """Return the report of an evaluation as HTML; `attention` is a section of it."""
        config = self.config
        now = Evaluated(step, self.epoch(step), evaluation.score.metrics)  # perhaps not in the history yet
        known = {entry.step: entry for entry in [now, *read_history(self.root)] if entry.step <= step}
        history = [known[number] for number in sorted(known)]
        epoch = f"{known[step].epoch:g}"
        facts = {
            "evaluated": f"epoch {epoch} of {config.optim.epochs}, step {step:,}, {evaluation.images:,} images",
            "training data": _described(self.train),
            "validation data": _described(self.val),
            "code": f"commit {self.code_commit}",
            "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        before = [progress_section(history, config.optim.epochs)]
        if evaluation.panoptic:
            before.append(segments_section(self.val, evaluation.panoptic))
        if config.evaluate.pictures:
            sheet = evaluation_sheet(self.val, evaluation, config.evaluate.pictures)
            before.append(detections_section(sheet, self.val.panoptic))
        return report_page(
            f"{config.run_name}: {deciding_text(evaluation.score.metrics)} at epoch {epoch}",
            facts,
            self.val,
            evaluation.score,
            evaluation.detections,
            diagnosis,
            drawn=drawn,
            before=before,
            after=[attention, configuration_section(config)],
            remedy=REMEDY,
        )


def _described(manifest: Manifest) -> str:
    counts = f"{manifest.images:,} images, {manifest.annotations:,} objects, {manifest.num_classes} classes"
    return f"{manifest.name}, {counts}, digest {manifest.digest[:12]}, {manifest.url}"
