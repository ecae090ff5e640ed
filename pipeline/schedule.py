"""The schedule of a run in steps: learning rate, evaluations, checkpoints. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pipeline.config import OptimConfig, RunConfig
from shards.config import EpochTail
from shards.plan.steps import START, Origin, Steps


def next_evaluation(config: RunConfig, schedule: Schedule, step: int) -> int:
    """Return the first step after `step` at which an evaluation is due."""
    return min(_next_multiple(config.evaluate.every, schedule, step), schedule.total_steps)


def is_evaluated(config: RunConfig, schedule: Schedule, step: int) -> bool:
    """Return True if the checkpoint of `step` is to be evaluated."""
    return step > 0 and next_evaluation(config, schedule, step - 1) == step


def next_boundary(config: RunConfig, schedule: Schedule, step: int) -> int:
    """Return the first step after `step` at which a checkpoint or an evaluation is due."""
    every, milestones = config.checkpoint.every_steps, config.checkpoint.keep_every_epochs
    nearest = next_evaluation(config, schedule, step)
    if milestones:
        nearest = min(nearest, _next_multiple(milestones, schedule, step))
    return min(nearest, (step // every + 1) * every) if every else nearest


def is_milestone(config: RunConfig, schedule: Schedule, step: int) -> bool:
    """Return True if the checkpoint of `step` is never deleted (`checkpoint.keep_every_epochs`)."""
    every = config.checkpoint.keep_every_epochs
    return bool(every) and step > 0 and _next_multiple(every, schedule, step - 1) == step


def _next_multiple(every: int, schedule: Schedule, step: int) -> int:
    """Return the first step after `step` that starts an epoch whose number is a multiple of `every`."""
    epoch = int(schedule.epoch(step)) // every * every
    while schedule.steps(epoch) <= step:
        epoch += every
    return schedule.steps(epoch)


@dataclass(frozen=True)
class Schedule:
    """Durations of a run in steps, converted from epochs by the number of images and the global batch size.

    `origin` is the step and sample from which the stream is divided into steps; not 0 if a resume changed the stream.
    """

    config: OptimConfig
    images: int
    tail: EpochTail = "straddle"
    origin: Origin = START

    @property
    def cut(self) -> Steps:
        """Division of the stream of samples into steps."""
        return Steps(self.images, self.config.batch_size, self.tail, self.origin)

    def steps(self, epochs: float) -> int:
        """Return the first step that starts after `epochs` epochs or later; `epochs` may be fractional."""
        return self.cut.at(math.ceil(epochs * self.images))

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole run, at least those before `origin`."""
        steps = max(self.steps(self.config.epochs), self.origin.step)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def samples(self, step: int) -> int:
        """Return the number of samples that the first `step` steps consume."""
        return self.cut.position(step)

    def epoch(self, step: int) -> float:
        """Return the number of epochs, with fraction, after the first `step` steps."""
        return min(self.samples(step) / self.images, float(self.config.epochs))

    def epoch_of(self, step: int) -> int:
        """Return the epoch whose plan contains `step`: the last one whose first step is not after it."""
        return self.samples(step) // self.images

    def factor(self, step: int) -> float:
        """Return the factor on both learning rates at `step` (counted from 0).

        It depends on the number of samples, so that it does not jump if a run continues with another batch size.
        """
        config, seen = self.config, self.samples(step)
        warmup, start = config.warmup_epochs * self.images, config.decay_epoch * self.images
        if seen < warmup:
            return min(self.samples(step + 1) / warmup, 1.0)
        if seen < start:
            return 1.0
        if config.decay == "step":
            return config.decay_factor
        last = max(self.samples(self.total_steps - 1), start + 1)
        return 1.0 + (config.decay_factor - 1.0) * min((seen - start) / (last - start), 1.0)
