"""Amounts of work in a run: steps, evaluations and checkpoints, counted on its schedule. Pure functions."""

from __future__ import annotations

import msgspec

from pipeline.config import RunConfig
from pipeline.schedule import Schedule, is_milestone, next_boundary, next_evaluation


class Amounts(msgspec.Struct, frozen=True):
    """Work between a step and the end of a run."""

    steps: int
    epochs: float
    evaluations: int
    images: int
    """Validation images of an evaluation."""
    checkpoints: int
    """Checkpoints that are written."""
    kept: int
    """Maximum number of checkpoints that lie in the store at a time."""


def amounts(config: RunConfig, schedule: Schedule, val_images: int, begin: int = 0) -> Amounts:
    """Return the work from the step `begin` to the end; checkpoints by the clock (`every_minutes`) are not counted."""
    total = schedule.total_steps
    evaluations, at = 0, begin
    while at < total:
        at = next_evaluation(config, schedule, at)
        evaluations += 1
    checkpoints, milestones, at = 0, 0, begin
    while at < total:
        at = next_boundary(config, schedule, at)
        checkpoints += 1
        milestones += is_milestone(config, schedule, at)
    return Amounts(
        steps=max(total - begin, 0),
        epochs=schedule.epoch(total) - schedule.epoch(min(begin, total)),
        evaluations=evaluations,
        images=min(val_images, config.evaluate.limit or val_images),
        checkpoints=checkpoints,
        kept=min(checkpoints, config.checkpoint.keep + 1 + milestones),
    )
