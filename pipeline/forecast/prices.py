"""Prices of a run's work in seconds, and what a run has measured of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from statistics import median

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
_STEADY = 2  # intervals that a run must have after its first, which starts threads and fills buffers


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Time of the command that ended a run, by its use; a tag of the run."""

    wall_s: float
    """From the command to its end."""
    steps: int
    step_s: float
    """Mean seconds of a step, without the first interval between log points."""
    evaluations: int
    evaluation_s: float
    """Mean seconds that training paused for an evaluation."""
    images: int
    """Images of an evaluation."""
    other_s: float
    """Everything else: the start, the first steps, registration."""
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
    evaluation_s: float | None = None
    """Seconds of an evaluation of all images."""
    other_s: float | None = None


def costly_options(config: RunConfig) -> str:
    """Return a digest of the options that the time of a step or an evaluation depends on."""
    options = {name: value for name, value in flatten(config).items() if name.startswith(_COSTLY) and name not in _FREE}
    return hashlib.sha256(msgspec.json.encode(options, order="sorted")).hexdigest()[:16]


def measured(
    points: Sequence[tuple[int, float]],
    pauses: Sequence[float],
    *,
    begin: int,
    wall_s: float,
    images: int,
    options: str,
    gpu: bool,
    device: str,
) -> Measured | None:
    """Return the times of a command that trained from the step `begin` to the end, or None if it took no step.

    points: step and seconds per step at each log point. pauses: seconds of each evaluation.
    """
    ordered = sorted((step, seconds) for step, seconds in points if step > begin)
    if not ordered:
        return None
    intervals, before = [], begin
    for step, seconds in ordered:
        intervals.append((step - before, seconds))
        before = step
    steady = intervals[1:] if len(intervals) > _STEADY else intervals
    step_s = sum(steps * seconds for steps, seconds in steady) / sum(steps for steps, _ in steady)
    steps = before - begin
    return Measured(
        wall_s=wall_s,
        steps=steps,
        step_s=step_s,
        evaluations=len(pauses),
        evaluation_s=sum(pauses) / len(pauses) if pauses else 0.0,
        images=images,
        other_s=max(wall_s - steps * step_s - sum(pauses), 0.0),
        options=options,
        gpu=gpu,
        device=device,
    )


def prices(runs: Sequence[Measured], images: int, source: str) -> Prices:
    """Return the median prices of runs on one device; evaluations are scaled to so many images."""
    each = [run.evaluation_s / run.images for run in runs if run.evaluations and run.images]
    return Prices(
        source=source,
        device=runs[0].device,
        step_s=median(run.step_s for run in runs),
        evaluation_s=median(each) * images if each else None,
        other_s=median(run.other_s for run in runs),
    )
