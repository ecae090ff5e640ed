"""Prices of a run's work in seconds, and what a run has measured of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import msgspec

from pipeline.config import RunConfig, flatten

_COSTLY = (
    *(
        "model.",
        "transform.",
        "compute.",
        "loss.auxiliary",
        "loss.one_to_many_copies",
        "optim.batch_size",
        "optim.train",
    ),
    *("optim.normalise", "data.reader_threads", "data.sort_window", "evaluate.batch_size", "evaluate.batching"),
    *("evaluate.scorer", "evaluate.asynchronous", "cluster.strategy", "cluster.workers", "cluster.cpus_per_worker"),
)
_FREE = ("model.backbone_weights",)
PRICED = 3
"""Runs whose median is the price: a machine changes, so the newest tell most."""
_STEADY = 2  # intervals that a run must have after its first, which starts threads and fills buffers


class Point(NamedTuple):
    """Value of a curve at a step."""

    step: int
    value: float
    at: float = 0.0
    """Seconds since the epoch by the clock of the machine that reported it."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Time of the command that ended a run, by its use; a tag of the run."""

    wall_s: float
    """From the command to its end."""
    steps: int
    step_s: float
    """Mean seconds of a step, without the first interval between log points."""
    cpu_s: float = 0.0
    """Mean processor time of a worker per step, in seconds."""
    evaluations: int
    evaluation_s: float
    """Mean seconds that training paused for an evaluation."""
    images: int
    """Images of an evaluation."""
    start_s: float = 0.0
    """From the command to the first step, and what the first steps took more than the others."""
    end_s: float = 0.0
    """From the last step to the end, without the last evaluation."""
    saves_s: float = 0.0
    """Everything else between the first step and the last: pauses for checkpoints."""
    other_s: float = 0.0
    """All but steps and evaluations, in tags of a release that did not divide it into the three above."""
    options: str
    """Digest of the options that the time of a step or an evaluation depends on."""
    gpu: bool
    device: str


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds that the work of a run takes on a device; None where nobody has measured it."""

    source: str
    """Measurements that they come from, for a person."""
    device: str
    step_s: float
    cpu_s: float | None = None
    """Processor time of a worker per step."""
    evaluation_s: float | None = None
    """Seconds of an evaluation of all images."""
    start_s: float | None = None
    end_s: float | None = None
    saves_s: float = 0.0
    """Pauses for checkpoints, per step."""
    each: tuple[Prices, ...] = ()
    """Prices of each run that was measured, the newest first."""


def costly_options(config: RunConfig) -> str:
    """Return a digest of the options that the time of a step or an evaluation depends on."""
    options = {name: value for name, value in flatten(config).items() if name.startswith(_COSTLY) and name not in _FREE}
    return hashlib.sha256(msgspec.json.encode(options, order="sorted")).hexdigest()[:16]


def measured(
    points: Sequence[Point],
    pauses: Sequence[Point],
    cpu: Sequence[Point] = (),
    *,
    begin: int,
    began: float,
    wall_s: float,
    images: int,
    options: str,
    gpu: bool,
    device: str,
) -> Measured | None:
    """Return the times of a command that trained from the step `begin` to the end, or None if it took no step.

    points: seconds per step at each log point. pauses: seconds of each evaluation. cpu: processor time per step at each
    log point. began: time at which the command began.
    """
    ordered = sorted(point for point in points if point.step > begin)
    evaluations = [pause for pause in pauses if pause.step > begin]
    if not ordered:
        return None
    first, last = ordered[0], ordered[-1]
    step_s, steps = _mean_per_step(ordered, begin), last.step - begin
    before = sum(pause.value for pause in evaluations if pause.step < first.step)
    within = sum(pause.value for pause in evaluations if first.step <= pause.step < last.step)
    after = sum(pause.value for pause in evaluations if pause.step >= last.step)
    start_s = min(max(first.at - began - (first.step - begin) * step_s - before, 0.0), wall_s)
    end_s = max(began + wall_s - last.at - after, 0.0)
    rest = last.at - first.at - (last.step - first.step) * step_s - within
    return Measured(
        wall_s=wall_s,
        steps=steps,
        step_s=step_s,
        cpu_s=_mean_per_step(sorted(point for point in cpu if point.step > begin), begin),
        evaluations=len(evaluations),
        evaluation_s=(before + within + after) / len(evaluations) if evaluations else 0.0,
        images=images,
        start_s=start_s,
        end_s=end_s,
        saves_s=max(rest, 0.0),
        options=options,
        gpu=gpu,
        device=device,
    )


def _mean_per_step(ordered: Sequence[Point], begin: int) -> float:
    """Return the mean over steps of a value per step, without the first interval if there are enough."""
    intervals, before = [], begin
    for point in ordered:
        intervals.append((point.step - before, point.value))
        before = point.step
    steady = intervals[1:] if len(intervals) > _STEADY else intervals
    return sum(steps * value for steps, value in steady) / max(sum(steps for steps, _ in steady), 1)


def prices(runs: Sequence[Measured], images: int, source: str) -> Prices:
    """Return the median prices of the newest of runs on one device; evaluations are scaled to so many images."""
    each = tuple(_prices(run, images) for run in runs)
    newest = each[:PRICED]
    evaluations = [price.evaluation_s for price in newest if price.evaluation_s is not None] or [
        price.evaluation_s for price in each if price.evaluation_s is not None
    ]
    cpu = [price.cpu_s for price in newest if price.cpu_s]
    return Prices(
        source=source,
        device=runs[0].device,
        step_s=median(price.step_s for price in newest),
        cpu_s=median(cpu) if cpu else None,
        evaluation_s=median(evaluations) if evaluations else None,
        start_s=median(price.start_s or 0.0 for price in newest),
        end_s=median(price.end_s or 0.0 for price in newest),
        saves_s=median(price.saves_s for price in newest),
        each=each if len(each) > 1 else (),
    )


def _prices(run: Measured, images: int) -> Prices:
    return Prices(
        source="",
        device=run.device,
        step_s=run.step_s,
        cpu_s=run.cpu_s or None,
        evaluation_s=run.evaluation_s / run.images * images if run.evaluations and run.images else None,
        start_s=run.start_s + run.other_s,
        end_s=run.end_s,
        saves_s=run.saves_s / max(run.steps, 1),
    )
