"""Time and memory of several sides: their rounds alternate, so that other load of the machine affects all of them."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds per call, of each round in turn."""

    rounds_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.rounds_s)

    @property
    def best_s(self) -> float:
        return min(self.rounds_s)

    def ratio_to(self, other: "Timing") -> float:
        """Return this side's time over the other's: the median over the rounds, in which both ran in turn."""
        return statistics.median(mine / its for mine, its in zip(self.rounds_s, other.rounds_s, strict=True))


def side_by_side(
    works: Mapping[str, Work],
    *,
    rounds: int,
    calls: int = 1,
    device: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each of `works` `rounds` times in turn, `calls` calls at a time, after one call each to warm up.

    On a busy machine `time.process_time` is the clock that other load affects less; it does not see a device.
    """
    # glibc keeps large blocks only after one was freed, which happens early in any training process. A small bench
    # would otherwise return its memory after each call and measure page faults.
    torch.empty(30 << 20, dtype=torch.uint8)
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, work in works.items():
                seconds[name].append(_seconds(work, calls, device, clock))
    finally:
        gc.enable()
    return {name: Timing(tuple(found)) for name, found in seconds.items()}


def _seconds(work: Work, calls: int, device: str, clock: Callable[[], float]) -> float:
    _wait(device)
    start = clock()
    for _ in range(calls):
        work()
    _wait(device)
    return (clock() - start) / calls


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class PeakMemory:
    """Peak of the bytes in use since the object was made: of the device, or of the process if the device is the CPU.

    The peak of a process can be reset on Linux only, and reuse of memory that was freed before does not show, so a peak
    on the CPU is measured in a process of its own.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated()
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
