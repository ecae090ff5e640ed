"""Timeline of a start across processes: rank 0 sends its marks after the first step, and the driver prints all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from pipeline.cluster.notes.notes import Notes
from pipeline.timeline import Mark, describe, mark, marks

_NOTE = "timeline"
_LOOK_S = 0.5


class FirstStep:
    """Callback of rank 0 that sends its marks to the driver once."""

    def __init__(self, notes: Notes) -> None:
        self._notes: Notes | None = notes

    def __call__(self) -> None:
        """Send the marks after the first step; do nothing after later ones."""
        notes, self._notes = self._notes, None
        if notes:
            mark("first step done")
            notes.write(_NOTE, msgspec.json.encode(marks("process of rank 0 started")))


@contextmanager
def printed_timeline(notes: Notes, say: Callable[[str], None]) -> Iterator[None]:
    """Print the timeline when the first step is done in the block; clocks of several hosts may differ."""
    over = threading.Event()
    thread = threading.Thread(target=_print, args=(notes, say, over), name="timeline", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_LOOK_S)


def _print(notes: Notes, say: Callable[[str], None], over: threading.Event) -> None:
    while not over.wait(_LOOK_S):
        sent = notes.read(_NOTE)
        if sent is not None:
            for line in describe([*marks("command started"), *msgspec.json.decode(sent, type=list[Mark])]):
                say(line)
            return
