"""Timeline of a start, from the command to the first step: marks of this process, and of others that send theirs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import NamedTuple


class Mark(NamedTuple):
    """Something that has happened; `at` is in seconds since the epoch by the clock of its machine."""

    at: float
    what: str


_marks: list[Mark] = []


def mark(what: str) -> None:
    """Note that this has happened now."""
    _marks.append(Mark(time.time(), what))


def marks(first: str) -> list[Mark]:
    """Return the marks of this process; the first one, `first`, is its start."""
    return [Mark(process_start(), first), *_marks]


def describe(found: Iterable[Mark]) -> list[str]:
    """Return a line for each mark, in order, with the seconds since the earliest."""
    ordered = sorted(found)
    return [f"{at - ordered[0].at:7.1f} s  {what}" for at, what in ordered]


def process_start() -> float:
    """Return the time at which this process was started, in seconds since the epoch."""
    import psutil

    return float(psutil.Process(os.getpid()).create_time())
