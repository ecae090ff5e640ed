"""Curves of a run: losses, learning rates, speed and step time by phase, averaged between two log points."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import torch
from torch import Tensor

from detr.criterion import Losses
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from pipeline.tracking.progress import Forecast, RunProgress
from pipeline.tracking.step_timer import PHASES, CpuClock, StepClock, memory_gib
from pipeline.tracking.tags import TAG_DATA_WAIT, TAG_PROGRESS
from pipeline.tracking.tracker import SUMMARY, Tracker

_MOST_WAIT = 0.05  # share of a step
_CHECKED_STEPS = 20  # over fewer steps the share of waiting is mostly noise


class Interval(NamedTuple):
    """Means over the steps and ranks between two log points."""

    losses: list[float]
    phases: dict[str, float]
    """Seconds per step in each phase."""
    waits: list[float]
    """Seconds per step that each rank waits for data."""
    memory_gib: float
    """Maximum over ranks."""
    cpu_s: float = 0.0
    """Processor time of a rank per step; under other work on its processors a step takes longer, and this hardly."""

    @property
    def step_s(self) -> float:
        """Seconds per step."""
        return sum(self.phases.values())


class Meter:
    """Sums of losses and times between log points; losses stay on the device, so that no step waits for them.

    `stalled_s` returns the seconds that training has waited for checkpoints so far.
    """

    def __init__(
        self,
        schedule: Schedule,
        ranks: Ranks,
        tracker: Tracker | None,
        stalled_s: Callable[[], float] = lambda: 0.0,
        forecast: Forecast | None = None,
    ) -> None:
        self._schedule, self._ranks, self._tracker, self._forecast = schedule, ranks, tracker, forecast
        self._stalled_s = stalled_s
        self._stalled_before = stalled_s()
        self._stalled_paused = 0.0
        self._watch = WaitWatch()
        self.loss = math.nan
        """Mean loss before the last log point."""
        self.clock, self.cpu = StepClock(ranks.device), CpuClock()
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._norm: Tensor | None = None
        self._steps = self._images = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock while the block saves or evaluates; only waits for a checkpoint count as step time."""
        self.clock.lap("other")
        self.cpu.stop()
        stalled = self._stalled_s()
        yield
        self._stalled_paused += self._stalled_s() - stalled
        self.clock.start()
        self.cpu.start()

    def add(self, losses: Losses, grad_norm: Tensor, images: int) -> None:
        """Add a step: this rank's share of the losses, the gradient norm and the number of images over all ranks."""
        values = torch.stack([losses.total.detach(), *losses.parts.values()])
        self._names = ["loss", *losses.parts]
        self._sum = values if self._sum is None else self._sum + values
        self._norm = grad_norm
        self._steps += 1
        self._images += images

    @contextmanager
    def paused_for_evaluation(self) -> Iterator[None]:
        """Stop the clock while the block evaluates, and give the time to the forecast."""
        start, stalled = time.perf_counter(), self._stalled_s()
        with self.paused():
            yield
        if self._forecast:
            self._forecast.evaluated(time.perf_counter() - start - (self._stalled_s() - stalled))

    def log(self, step: int, rates: Mapping[str, float]) -> None:
        """Send the means over the steps since the last call and over ranks to the tracker; a collective call.

        rates: the learning rates by group of parameters; `main` gives the curve `optim/lr`, others `optim/lr_GROUP`.
        """
        if self._sum is None or self._norm is None:
            return  # no step was taken
        interval = self._interval(self._sum)
        self.loss = interval.losses[0]
        if self._forecast:
            self._forecast.stepped(self._steps, self._steps * interval.step_s, interval.phases["forward"])
        if self._tracker:
            epoch = self._schedule.epoch(step)
            values = {_chart(name): value for name, value in zip(self._names, interval.losses, strict=True)}
            values[f"{SUMMARY}/loss"] = self.loss
            values |= {"optim/grad_norm": float(self._norm), "epoch": epoch}
            values |= {"optim/lr" if name == "main" else f"optim/lr_{name}": rate for name, rate in rates.items()}
            values["speed/images_per_s"] = self._images / max(self._steps * interval.step_s, 1e-9)
            values["speed/memory_gib"] = interval.memory_gib
            self._tracker.metrics(values | _breakdown(interval), step)
            self._tracker.tags(self._tags(step, epoch, interval))
        self._reset()

    def _interval(self, losses: Tensor) -> Interval:
        self.clock.lap("other")
        phases = self.clock.read()
        stalled = self._stalled_s()
        phases["checkpoint_stall"] = stalled - self._stalled_before
        # Waits outside of pauses were measured within the optimizer's update.
        phases["optimizer"] -= phases["checkpoint_stall"] - self._stalled_paused
        self._stalled_before, self._stalled_paused = stalled, 0.0
        # One reduction for everything: losses and phases are summed; waits and memory have a column for each rank.
        by_rank = torch.zeros(2, self._ranks.world_size, dtype=torch.float64)
        by_rank[:, self._ranks.rank] = torch.tensor([phases["data_wait"], memory_gib(self._ranks.device)])
        seconds = torch.tensor([*(phases[name] for name in PHASES), self.cpu.read()], dtype=torch.float64)
        host = torch.cat([seconds, by_rank.flatten()])
        sums = self._ranks.sum(torch.cat([losses.double(), host.to(losses.device)])).cpu()
        losses, seconds, by_rank = torch.split(sums, [len(losses), len(seconds), by_rank.numel()])
        waits, memory = by_rank.view(2, -1)
        # Each rank's loss is its share times the world size, so the mean over ranks is the global batch's loss.
        per_step = self._steps * self._ranks.world_size
        *of_phases, cpu_s = (seconds / per_step).tolist()
        return Interval(
            (losses / per_step).tolist(),
            dict(zip(PHASES, of_phases, strict=True)),
            (waits / self._steps).tolist(),
            float(memory.max()),
            cpu_s,
        )

    def _tags(self, step: int, epoch: float, interval: Interval) -> dict[str, str]:
        left_s = self._forecast.remaining_s(step) if self._forecast else None
        end = "" if left_s is None else (datetime.now(UTC) + timedelta(seconds=left_s)).isoformat(timespec="seconds")
        tags = {TAG_PROGRESS: RunProgress(step, round(epoch, 4), end).to_json()}
        warning = self._watch.check(self._steps, interval)
        return tags if warning is None else tags | {TAG_DATA_WAIT: warning}


class WaitWatch:
    """Warning that workers wait too long for data, given once and cleared when it has passed."""

    def __init__(self) -> None:
        self._steps, self._wait_s, self._all_s = 0, 0.0, 0.0
        self._checks, self._warned = 0, False

    def check(self, steps: int, interval: Interval) -> str | None:
        """Return a new warning, an empty text if the last one has passed, or None if nothing has changed.

        The slowest rank counts, because all wait for it. The first `_CHECKED_STEPS` are ignored: they include the start
        of the reader threads.
        """
        self._steps += steps
        self._wait_s += steps * max(interval.waits)
        self._all_s += steps * interval.step_s
        if self._steps < _CHECKED_STEPS:
            return None
        share = self._wait_s / max(self._all_s, 1e-9)
        self._steps, self._wait_s, self._all_s = 0, 0.0, 0.0
        self._checks += 1
        # The warning ends at half the limit, so that a share close to the limit is one warning and not many.
        slow = self._checks > 1 and share > (_MOST_WAIT / 2 if self._warned else _MOST_WAIT)
        if slow == self._warned:
            return None
        self._warned = slow
        if not slow:
            return ""
        rank = interval.waits.index(max(interval.waits))
        return (
            f"worker {rank} waits for data {share:.0%} of the time; expected at most {_MOST_WAIT:.0%}: more "
            "--data.reader-threads (and --cluster.cpus-per-worker), --transform.pixels fast, or --data.cache on a fast disk"
        )


def _breakdown(interval: Interval) -> dict[str, float]:
    """Return two groups of charts: seconds per step, and shares of it."""
    seconds = {f"step/{name}_s": value for name, value in interval.phases.items()}
    seconds |= {"step/slowest_data_wait_s": max(interval.waits), "step/total_s": interval.step_s}
    seconds["step/cpu_s"] = interval.cpu_s
    total = max(interval.step_s, 1e-9)
    return seconds | {f"step_share/{name}": value / total for name, value in interval.phases.items()}


def _chart(name: str) -> str:
    """Return the chart of a loss: `train` for the last decoder layer, `train_layers` for the others (`loss_ce_0`)."""
    is_numbered = name.rpartition("_")[2].isdigit()
    return f"train_layers/{name}" if is_numbered else f"train/{name}"
