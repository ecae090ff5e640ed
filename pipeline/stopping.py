"""How a run that is asked to stop does so at a checkpoint.

The driver hears Ctrl-C and SIGTERM and leaves a note in the run's folder. Rank 0 looks for it about once a second and
tells the others with the sums that every step makes in any case, so that all stop after the same step, save, and return.
Nothing is lost, and `detr resume` goes on with the next step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

_NOTE = "stop"
_LOOK_S = 1.0  # a folder that many nodes share should not be asked at every step


def ask_to_stop(run_folder: Path) -> None:
    """Leave the note."""
    (run_folder / _NOTE).touch()


def asked_to_stop(run_folder: Path) -> bool:
    """Whether the note is there."""
    return (run_folder / _NOTE).exists()


def withdraw(run_folder: Path) -> None:
    """Take the note of an earlier attempt away."""
    (run_folder / _NOTE).unlink(missing_ok=True)


class Asked(NamedTuple):
    """What is wanted of all ranks after a step, as soon as any of them wants it."""

    save: bool = False
    """A checkpoint now, beside those that are due."""
    stop: bool = False
    """A checkpoint, and the end."""


NOTHING = Asked()


class StopWatch:
    """Looks for the note, seldom."""

    def __init__(self, run_folder: Path) -> None:
        self._folder, self._next, self._asked = run_folder, 0.0, False

    def asked(self) -> Asked:
        """What this rank asks for after the step at hand."""
        now = time.monotonic()
        if not self._asked and now >= self._next:
            self._next, self._asked = now + _LOOK_S, asked_to_stop(self._folder)
        return Asked(stop=self._asked)
