"""Receiver of a spool's events that can be down, and a wait for what a thread does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

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


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds, for 10 s at most."""
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)
