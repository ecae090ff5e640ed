"""Record of what happens on the pretended GPU."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch

_ROOT = f"{Path(__file__).parents[3]}/"
_OURS = (f"{_ROOT}detr/", f"{_ROOT}pipeline/")
DEVICE = torch.device("cuda:0")


@dataclass(frozen=True)
class Event:
    """Operation, and the file of this project that called it; empty if none did, as in a backward pass."""

    operation: str
    file: str


@dataclass
class PretendedGpu:
    """Record of what happened on the device."""

    waits: list[Event] = field(default_factory=list)
    """Moments at which the host waits for the device."""
    blocking_copies: list[Event] = field(default_factory=list)
    """Copies to the device that are not `non_blocking`."""
    copies_from_host: list[Event] = field(default_factory=list)
    """All copies to the device."""
    operations: int = 0
    """Number of operations, on either device."""
    launches: Counter[Event] = field(default_factory=Counter)
    """Operations of the device that launch at least one kernel: all but views and allocations."""

    strays: list[str] = field(default_factory=list)
    """Uses of CUDA's runtime in threads that have not chosen a device, which make a context on GPU 0: "THREAD: CALL"."""
    chosen: threading.local = field(default_factory=threading.local)

    def touch(self, call: str) -> None:
        """Record a use of the runtime; the thread that began to pretend has chosen its device, as Ray does it."""
        if not getattr(self.chosen, "device", None):
            self.strays.append(f"{threading.current_thread().name}: {call}")

    def record(self, operation: str) -> None:
        """Count an operation as a launch."""
        self.launches[event_here(operation)] += 1


_current = PretendedGpu()


def recorded() -> PretendedGpu:
    """Return the record that is being written."""
    return _current


def start() -> PretendedGpu:
    """Begin an empty record."""
    global _current
    _current = PretendedGpu()
    return _current


def event_here(operation: str) -> Event:
    """Return the operation with the innermost frame of this project's packages."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            return Event(operation, path[len(_ROOT) :])
        frame = frame.f_back
    return Event(operation, "")
