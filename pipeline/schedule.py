"""Steps at which a run saves and evaluates: pure functions of the step, so a resumed run uses the same."""

from __future__ import annotations

from pipeline.config import RunConfig
from pipeline.optim import Schedule


def next_evaluation(config: RunConfig, schedule: Schedule, step: int) -> int:
    """Return the first step after `step` at which an evaluation is due."""
    every = config.evaluate.every
    epoch = int(schedule.epoch(step)) // every * every
    while schedule.steps(epoch) <= step:
        epoch += every
    return min(schedule.steps(epoch), schedule.total_steps)


def is_evaluated(config: RunConfig, schedule: Schedule, step: int) -> bool:
    """Return true if the checkpoint of `step` is to be evaluated."""
    return step > 0 and next_evaluation(config, schedule, step - 1) == step


def next_boundary(config: RunConfig, schedule: Schedule, step: int) -> int:
    """Return the first step after `step` at which a checkpoint or an evaluation is due."""
    every, milestones = config.checkpoint.every_steps, config.checkpoint.keep_every_epochs
    nearest = next_evaluation(config, schedule, step)
    if milestones:
        nearest = min(nearest, _next_milestone(milestones, schedule, step))
    return min(nearest, (step // every + 1) * every) if every else nearest


def is_milestone(config: RunConfig, schedule: Schedule, step: int) -> bool:
    """Return true if the checkpoint of `step` is never deleted (`checkpoint.keep_every_epochs`)."""
    every = config.checkpoint.keep_every_epochs
    return bool(every) and step > 0 and _next_milestone(every, schedule, step - 1) == step


def _next_milestone(every: int, schedule: Schedule, step: int) -> int:
    epoch = int(schedule.epoch(step)) // every * every
    while schedule.steps(epoch) <= step:
        epoch += every
    return schedule.steps(epoch)
