"""What the curves of a run are made of: losses, rates and speed, averaged between two log points."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from detr.criterion import Losses
from pipeline.optim import Schedule
from pipeline.parallel import Ranks
from pipeline.step import StepResult
from pipeline.track import Tracker


class Meter:
    """Sums losses on the device between log points, so that no step waits for a figure nobody reads yet."""

    def __init__(self, schedule: Schedule, ranks: Ranks, tracker: Tracker | None) -> None:
        self._schedule, self._ranks, self._tracker = schedule, ranks, tracker
        self._reset()
        self._last = time.perf_counter()

    def _reset(self) -> None:
        self._names: list[str] = []
        self._sum: Tensor | None = None
        self._norm: Tensor | None = None
        self._steps = self._images = 0
        self._wait_s = 0.0
        self._start = time.perf_counter()

    def waited(self) -> float:
        """Seconds since the last step ended: the wait for data."""
        return time.perf_counter() - self._last

    def go_on(self) -> None:
        """What has come since the last step, such as a save, was no wait for data."""
        self._last = time.perf_counter()

    def add(self, result: StepResult, images: int, waited_s: float) -> None:
        """Take in one step over so many images of all ranks."""
        names, values = _figures(result.losses)
        self._names, self._sum = names, values if self._sum is None else self._sum + values
        self._norm = result.grad_norm
        self._steps += 1
        self._images += images
        self._wait_s += waited_s
        self._last = time.perf_counter()

    def tell(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Average over the interval and over ranks, and give it to the tracker; a collective call."""
        if self._sum is None or self._norm is None:
            return  # no step was taken
        # Each rank's loss is its share times the world size, so the mean over ranks is the global batch's loss.
        means = (self._ranks.sum(self._sum) / (self._steps * self._ranks.world_size)).tolist()
        seconds = max(time.perf_counter() - self._start, 1e-9)
        if self._tracker:
            epoch = self._schedule.epoch(step)
            rates = [group["lr"] for group in optimizer.param_groups]
            values = {_chart(name): value for name, value in zip(self._names, means, strict=True)}
            values |= {"optim/lr": rates[0], "optim/grad_norm": float(self._norm), "epoch": epoch}
            values |= {"optim/lr_backbone": rates[1]} if len(rates) > 1 else {}
            values |= {"speed/images_per_s": self._images / seconds, "speed/data_wait": self._wait_s / seconds}
            self._tracker.metrics(values, step)
        self._reset()


def _figures(losses: Losses) -> tuple[list[str], Tensor]:
    names = ["loss", *losses.parts]
    return names, torch.stack([losses.total.detach(), *losses.parts.values()])


def _chart(name: str) -> str:
    """Charts are grouped by what stands before the slash: the last layer's parts together, the other layers' aside."""
    return f"train_layers/{name}" if name.rpartition("_")[2].isdigit() else f"train/{name}"
