"""Time of a step by phase, measured without waiting for the device.

A lap ends a phase: the time since the previous lap is counted to it. On a CPU a lap reads the clock. A GPU runs behind
the host, so there a lap records an event in the stream, and the time between two events is what the device took or
idled; the events are read at log points, which wait for the device anyway. In both cases the phases add up to the total
time. A step has seven laps, which take 2 microseconds on a CPU, reading included.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal, get_args

import torch

Phase = Literal["data_wait", "forward", "loss", "backward", "optimizer", "checkpoint_stall", "other"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""forward and backward: the network; backward also averages gradients over ranks. loss: matching and losses. optimizer:
clipping, the check of the norm, and the update. checkpoint_stall: see `Saver.stalled_s`. other: ranks waiting for each
other before a step, and bookkeeping."""
Lap = Callable[[Phase], None]


def no_lap(phase: Phase) -> None:
    """Do nothing: the lap of callers that do not measure."""


class StepClock:
    """Sums of the seconds of each phase since they were last read."""

    def __init__(self, device: torch.device) -> None:
        self._marks: _HostMarks | _DeviceMarks = _DeviceMarks() if device.type == "cuda" else _HostMarks()
        self._laps: list[tuple[Phase | None, Any]] = []
        self.start()

    def start(self) -> None:
        """Discard the time since the last lap."""
        self._laps.append((None, self._marks.mark()))

    def lap(self, phase: Phase) -> None:
        """Count the time since the last lap to `phase`."""
        self._laps.append((phase, self._marks.mark()))

    def read(self) -> dict[Phase, float]:
        """Return the seconds of each phase since the last call; on a GPU, wait for the work before the last lap."""
        self._marks.wait(self._laps[-1][1])
        seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        for (_, start), (phase, end) in pairwise(self._laps):
            if phase is not None:
                seconds[phase] += self._marks.seconds(start, end)
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
    """CUDA events, reused after they have been read."""

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


class CpuClock:
    """Seconds of processor time that all threads of this process have taken while the clock ran."""

    def __init__(self) -> None:
        self._sum, self._since = 0.0, time.process_time()

    def start(self) -> None:
        """Discard the time since the clock was stopped or read."""
        self._since = time.process_time()

    def stop(self) -> None:
        """Count the time so far; without `start` it would continue."""
        now = time.process_time()
        self._sum, self._since = self._sum + now - self._since, now

    def read(self) -> float:
        """Return the seconds since the last call."""
        self.stop()
        seconds, self._sum = self._sum, 0.0
        return seconds


def memory_gib(device: torch.device) -> float:
    """Return the peak memory allocated on a GPU, or the current resident size of the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**30
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
