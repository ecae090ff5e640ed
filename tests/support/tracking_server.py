"""Receiver of a spool's events that can be down, a disk that fills up, and a wait for what a thread does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO

from pipeline.tracking.events import Event


class Server:
    """Receiver that accepts events while it is up and keeps them."""

    def __init__(self, up: bool = True) -> None:
        self.up = up
        self.taken: list[Event] = []
        self.calls = threading.Semaphore(0)

    def __call__(self, events: Sequence[Event]) -> None:
        """Keep the events, or raise `ConnectionError`."""
        self.calls.release()
        if not self.up:
            raise ConnectionError("down")
        self.taken += events

    def points(self, name: str = "train/loss") -> list[tuple[int, float]]:
        """Return the points of a curve in the order in which they came."""
        return [(event.step, event.values[name]) for event in self.taken if name in event.values]


class FullDisk:
    """File on a disk with a limited number of free bytes."""

    def __init__(self, file: BinaryIO, free: int) -> None:
        self.file, self.free = file, free
        self.closed = False

    def write(self, line: bytes) -> int:
        """Write as much of the line as fits; raise `OSError` if nothing does."""
        if not self.free:
            raise OSError(28, "No space left on device")
        written = self.file.write(line[: self.free])
        self.free -= written
        return written

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        self.closed = True


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for 60 s at most."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
