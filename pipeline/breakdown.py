"""Where a step's time goes: the wait for data and each part of the step, measured without waiting for the device.

A lap ends a part: whatever passed since the lap before is the part's. On a CPU a lap is the time of day. A GPU is behind
the host, so there it is an event in the stream of work, and the seconds between two are those that the device took, or
had nothing to do; they are read when a log point waits for the device in any case. Either way the parts add up to all the
time that passed. A step has seven laps, which take 2 microseconds on a CPU, reading them included.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

Part = Literal["data_wait", "forward", "loss", "backward", "optimizer", "checkpoint_stall", "other"]
PARTS: tuple[Part, ...] = get_args(Part)
"""forward and backward: the network; backward also averages gradients over ranks. loss: matching and losses. optimizer:
clip, the look at the norm, update. checkpoint_stall: see `Saver.stalled_s`. other: what ranks wait for each other before
a step, and bookkeeping."""
Lap = Callable[[Part], None]


def no_lap(part: Part) -> None:
    """For who does not measure."""


class StepClock:
    """Adds up the seconds of each part until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._marks: _HostMarks | _DeviceMarks = _DeviceMarks() if device.type == "cuda" else _HostMarks()
        self._laps: list[tuple[Part | None, Any]] = []
        self.start()

    def start(self) -> None:
        """Leave out what passed since the last lap."""
        self._laps.append((None, self._marks.mark()))

    def lap(self, part: Part) -> None:
        """What passed since the last lap was spent on `part`."""
        self._laps.append((part, self._marks.mark()))

    def read(self) -> dict[Part, float]:
        """Seconds of each part since it was read before. On a GPU it waits for the work before the last lap."""
        self._marks.wait(self._laps[-1][1])
        seconds: dict[Part, float] = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, end) in pairwise(self._laps):
            if part is not None:
                seconds[part] += self._marks.seconds(start, end)
        self._marks.forget([mark for _, mark in self._laps[:-1]])
        self._laps = [(None, self._laps[-1][1])]
        return seconds


class _HostMarks:
    mark = staticmethod(time.perf_counter)

    def wait(self, mark: float) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def forget(self, marks: list[float]) -> None:
        pass


class _DeviceMarks:
    """Events, used again once they have been read."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def forget(self, marks: list[torch.cuda.Event]) -> None:
        self._free += marks


def memory_gib(device: torch.device) -> float:
    """The most that was allocated on a GPU so far; on a CPU the process's resident size now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**30
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
