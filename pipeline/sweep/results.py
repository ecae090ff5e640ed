"""Results of a sweep: a table for the terminal, and columns for MLflow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.display.terminal import table
from pipeline.sweep.sweep_file import SweepFile
from pipeline.sweep.trials import Trial

EARLY = "ended early"
"""Status of a trial that Ray Tune ended."""


@dataclass(frozen=True)
class Result:
    """A trial and how far it came."""

    trial: Trial
    status: str
    epoch: float
    best: float | None
    """Best value of the metric; None if it has reported none."""


def results_table(results: Sequence[Result], metric: str) -> str:
    """Return the trials with their best figures and, if there are any, the published ones on the same scale."""
    published = any(result.trial.published for result in results)
    header = ("trial", "status", "epoch", metric, *(("published",) if published else ()))
    rows = [
        (
            result.trial.name,
            result.status,
            f"{result.epoch:g}",
            "-" if result.best is None else f"{result.best:.4f}",
            *((_published(result.trial, metric),) if published else ()),
        )
        for result in results
    ]
    return table(header, rows)


def result_columns(results: Sequence[Result], metric: str) -> dict[str, list[Any]]:
    """Return the results by column."""
    columns: dict[str, list[Any]] = {
        "trial": [result.trial.name for result in results],
        "status": [result.status for result in results],
        "epoch": [result.epoch for result in results],
        metric: [result.best for result in results],
    }
    if any(result.trial.published for result in results):
        columns["published"] = [_published(result.trial, metric) for result in results]
    for name in dict.fromkeys(name for result in results for name in result.trial.values):
        columns[name] = [result.trial.values.get(name, "") for result in results]
    return columns


def file_table(sweep: SweepFile) -> str:
    """Return the trials of a file with their options and published figures."""
    figures = list(dict.fromkeys(name for trial in sweep.trials for name in trial.published))
    rows = [
        (
            trial.name,
            *(f"{trial.published[name]:g}" if name in trial.published else "-" for name in figures),
            " ".join(trial.options) or "-",
            trial.note,
        )
        for trial in sweep.trials
    ]
    lines = [f"{sweep.title}: recipe {sweep.recipe}", table(("trial", *figures, "options", ""), rows)]
    if sweep.source:
        lines.append(f"published: {sweep.source}")
    lines += [f"not possible here: {text}" for text in sweep.missing]
    return "\n".join(lines)


def _published(trial: Trial, metric: str) -> str:
    value = trial.published.get(metric.rpartition("/")[2])
    return "-" if value is None else f"{value / 100:.4f}"
