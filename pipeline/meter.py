"""What the curves of a run are made of: losses, rates, speed and where the time goes, averaged between two log points."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import torch
from torch import Tensor

from detr.criterion import Losses
from pipeline.breakdown import PARTS, StepClock, memory_gib
from pipeline.forecast import Forecast
from pipeline.optim import Schedule
from pipeline.parallel import Ranks
from pipeline.standing import TAG_PROGRESS, Progress
from pipeline.step import StepResult
from pipeline.track import TAG_WARNING, Tracker

TAG_DATA_WAIT = f"{TAG_WARNING}.data_wait"
_MOST_WAIT = 0.05
_JUDGED_STEPS = 20  # a share of less time is chance


class Interval(NamedTuple):
    """Means over ranks between two log points."""

    losses: list[float]
    parts: dict[str, float]
    """Seconds per step."""
    waits: list[float]
    """Each rank's wait for data, seconds per step."""
    memory_gib: float
    """Of the rank that has most."""

    @property
    def step_s(self) -> float:
        return sum(self.parts.values())


class Meter:
    """Sums losses on the device between log points, so that no step waits for a figure nobody reads yet.

    stalled_s: how long training has waited for checkpoints so far.
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
        self._stalled_aside = 0.0
        self._watch = WaitWatch()
        self.clock = StepClock(ranks.device)
        self._reset()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._norm: Tensor | None = None
        self._steps = self._images = 0

    @contextmanager
    def aside(self) -> Iterator[None]:
        """The block saves or evaluates: of the time that it takes, only the wait for a checkpoint is a step's."""
        self.clock.lap("other")
        stalled = self._stalled_s()
        yield
        self._stalled_aside += self._stalled_s() - stalled
        self.clock.start()

    def add(self, result: StepResult, images: int) -> None:
        """Take in one step over so many images of all ranks."""
        names, values = _figures(result.losses)
        self._names, self._sum = names, values if self._sum is None else self._sum + values
        self._norm = result.grad_norm
        self._steps += 1
        self._images += images

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The block evaluates; how long it keeps training waiting is part of the forecast."""
        start, stalled = time.perf_counter(), self._stalled_s()
        with self.aside():
            yield
        if self._forecast:
            self._forecast.evaluated(time.perf_counter() - start - (self._stalled_s() - stalled))

    def tell(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Average over the interval and over ranks, and give it to the tracker; a collective call."""
        if self._sum is None or self._norm is None:
            return  # no step was taken
        told = self._interval(self._sum)
        if self._forecast:
            self._forecast.stepped(self._steps, self._steps * told.step_s, told.parts["forward"])
        if self._tracker:
            epoch = self._schedule.epoch(step)
            rates = [group["lr"] for group in optimizer.param_groups]
            values = {_chart(name): value for name, value in zip(self._names, told.losses, strict=True)}
            values |= {"optim/lr": rates[0], "optim/grad_norm": float(self._norm), "epoch": epoch}
            values |= {"optim/lr_backbone": rates[1]} if len(rates) > 1 else {}
            speed = self._images / max(self._steps * told.step_s, 1e-9)
            values |= {"speed/images_per_s": speed, "speed/memory_gib": told.memory_gib}
            self._tracker.metrics(values | _breakdown(told), step)
            self._tracker.tags(self._tags(step, epoch, told))
        self._reset()

    def _interval(self, losses: Tensor) -> Interval:
        self.clock.lap("other")
        parts = self.clock.read()
        stalled = self._stalled_s()
        parts["checkpoint_stall"] = stalled - self._stalled_before
        # What was not waited aside was waited by the optimizer's update.
        parts["optimizer"] -= parts["checkpoint_stall"] - self._stalled_aside
        self._stalled_before, self._stalled_aside = stalled, 0.0
        alone = torch.zeros(2, self._ranks.world_size, dtype=torch.float64)
        alone[:, self._ranks.rank] = torch.tensor([parts["data_wait"], memory_gib(self._ranks.device)])
        host = torch.cat([torch.tensor([parts[name] for name in PARTS], dtype=torch.float64), alone.flatten()])
        sums = self._ranks.sum(torch.cat([losses.double(), host.to(losses.device)])).cpu()
        total, rest = sums[: len(losses)], sums[len(losses) :]
        seconds, (waits, memory) = rest[: len(PARTS)], rest[len(PARTS) :].view(2, -1)
        # Each rank's loss is its share times the world size, so the mean over ranks is the global batch's loss.
        per_step = self._steps * self._ranks.world_size
        return Interval(
            (total / per_step).tolist(),
            dict(zip(PARTS, (seconds / per_step).tolist(), strict=True)),
            (waits / self._steps).tolist(),
            float(memory.max()),
        )

    def _tags(self, step: int, epoch: float, told: Interval) -> dict[str, str]:
        left_s = self._forecast.remaining_s(step) if self._forecast else None
        end = "" if left_s is None else (datetime.now(UTC) + timedelta(seconds=left_s)).isoformat(timespec="seconds")
        tags = {TAG_PROGRESS: Progress(step, round(epoch, 4), end).to_json()}
        warning = self._watch.judge(self._steps, told)
        return tags if warning is None else tags | {TAG_DATA_WAIT: warning}


class WaitWatch:
    """Says when workers wait for data for too long, once, and when that has passed."""

    def __init__(self) -> None:
        self._steps, self._wait_s, self._all_s = 0, 0.0, 0.0
        self._judged, self._warned = 0, False

    def judge(self, steps: int, told: Interval) -> str | None:
        """A warning, an empty one where the last one has passed, or None where nothing has changed.

        The slowest rank counts, because all wait for it. The first share is not judged: it has the stream's beginning.
        """
        self._steps += steps
        self._wait_s += steps * max(told.waits)
        self._all_s += steps * told.step_s
        if self._steps < _JUDGED_STEPS:
            return None
        share = self._wait_s / max(self._all_s, 1e-9)
        self._steps, self._wait_s, self._all_s = 0, 0.0, 0.0
        self._judged += 1
        # Half of it before it has passed, so that a share about the bound is one warning and not many.
        waits = self._judged > 1 and share > (_MOST_WAIT / 2 if self._warned else _MOST_WAIT)
        if waits == self._warned:
            return None
        self._warned = waits
        rank = told.waits.index(max(told.waits))
        return waits * (
            f"worker {rank} waits for data {share:.0%} of the time; expected at most {_MOST_WAIT:.0%}: more "
            "--data.reader-threads (and --cluster.cpus-per-worker), --transform.pixels fast, or --data.cache on a fast disk"
        )


def _figures(losses: Losses) -> tuple[list[str], Tensor]:
    names = ["loss", *losses.parts]
    return names, torch.stack([losses.total.detach(), *losses.parts.values()])


def _breakdown(told: Interval) -> dict[str, float]:
    """Two groups of charts: seconds per step, and shares of it."""
    seconds = {f"step/{name}_s": value for name, value in told.parts.items()}
    seconds |= {"step/slowest_data_wait_s": max(told.waits), "step/total_s": told.step_s}
    whole = max(told.step_s, 1e-9)
    return seconds | {f"step_share/{name}": value / whole for name, value in told.parts.items()}


def _chart(name: str) -> str:
    """Charts are grouped by what stands before the slash: the last layer's parts together, the other layers' aside."""
    return f"train_layers/{name}" if name.rpartition("_")[2].isdigit() else f"train/{name}"
