"""How a run that is asked to stop, to make room for other numbers of workers, or to save does so at a checkpoint.

The driver hears Ctrl-C and SIGTERM and leaves a note in the run's folder; so does Ray's controller when it is about to
start the workers again in another number (`pipeline/controller.py`). Rank 0 looks for them about once a second and tells
the others with the sums that every step makes in any case, so that all stop after the same step, save, and return.
Nothing is lost, and `detr resume`, or the next group of workers, goes on with the next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_STOP = "stop"
_YIELD = "yield"
_LOOK_S = 1.0  # a folder that many nodes share should not be asked at every step


def ask_to_stop(run_folder: Path) -> None:
    """Leave the note."""
    (run_folder / _STOP).touch()


def asked_to_stop(run_folder: Path) -> bool:
    """Whether the note is there."""
    return (run_folder / _STOP).exists()


def withdraw(run_folder: Path) -> None:
    """Take the notes of an earlier attempt away."""
    (run_folder / _STOP).unlink(missing_ok=True)
    yielded(run_folder)


def ask_to_yield(run_folder: Path) -> None:
    """Leave the note that these workers are to save and return, since others take their place."""
    (run_folder / _YIELD).touch()


def asked_to_yield(run_folder: Path) -> bool:
    """Whether that note is still there."""
    return (run_folder / _YIELD).exists()


def yielded(run_folder: Path) -> None:
    """Take that note away: the workers have saved, or are not waited for any longer."""
    (run_folder / _YIELD).unlink(missing_ok=True)


class Asked(NamedTuple):
    """What is wanted of all ranks after a step, as soon as any of them wants it."""

    save: bool = False
    """A checkpoint now, beside those that are due."""
    stop: bool = False
    """A checkpoint, and the end."""


NOTHING = Asked()


@dataclass(frozen=True)
class Overseer:
    """Who started the loop: what it asks of the workers, and how it hears of them. By default nobody."""

    asks: Callable[[], Asked] = lambda: NOTHING
    """What rank 0 asks for after the step at hand, besides what is noted in the run's folder; called at every step."""
    stepped: Callable[[int], None] = lambda _: None
    """Told how many steps are done, after each."""


NOBODY = Overseer()


class StopWatch:
    """Looks for the notes, seldom, and asks the overseer."""

    def __init__(self, run_folder: Path, overseer: Overseer = NOBODY) -> None:
        self._folder, self._overseer, self._next, self._asked = run_folder, overseer, 0.0, False

    def asked(self) -> Asked:
        """What this rank asks for after the step at hand."""
        now = time.monotonic()
        if not self._asked and now >= self._next:
            self._next = now + _LOOK_S
            self._asked = asked_to_stop(self._folder) or asked_to_yield(self._folder)
        save, stop = self._overseer.asks()
        return Asked(save, stop or self._asked)
