"""Requests to the workers: stop, hand over to another number of workers, or save.

The driver leaves a note in the run's folder on Ctrl-C and SIGTERM; so does Ray's controller before it restarts the
workers in another number. Rank 0 looks for these notes about once a second and shares them with the other ranks in the
sums that every step makes anyway, so that all stop after the same step, save and return. Nothing is lost: `detr resume`,
or the next group of workers, continues with the next step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_STOP = "stop"
_YIELD = "yield"
_LOOK_S = 1.0  # not at every step: the folder may be on a file system that many nodes share


def ask_to_stop(run_folder: Path) -> None:
    """Ask the workers to save and stop."""
    (run_folder / _STOP).touch()


def asked_to_stop(run_folder: Path) -> bool:
    """Return True if the workers are asked to stop."""
    return (run_folder / _STOP).exists()


def withdraw(run_folder: Path) -> None:
    """Delete the requests of an earlier attempt."""
    (run_folder / _STOP).unlink(missing_ok=True)
    yielded(run_folder)


def ask_to_yield(run_folder: Path) -> None:
    """Ask the workers to save and return, because other workers will replace them."""
    (run_folder / _YIELD).touch()


def asked_to_yield(run_folder: Path) -> bool:
    """Return True if the workers are asked to hand over and have not done so."""
    return (run_folder / _YIELD).exists()


def yielded(run_folder: Path) -> None:
    """Clear the handover request: the workers have saved, or the wait for them is over."""
    (run_folder / _YIELD).unlink(missing_ok=True)


class Asked(NamedTuple):
    """Requests to all ranks after a step; one rank is enough to make them."""

    save: bool = False
    """Write a checkpoint now, besides those that are due."""
    stop: bool = False
    """Write a checkpoint and return."""


NOTHING = Asked()


@dataclass(frozen=True)
class Overseer:
    """Callbacks of the code that started the loop: its requests, and a call after each step. By default neither."""

    asks: Callable[[], Asked] = lambda: NOTHING
    """Return further requests of rank 0; called at every step."""
    stepped: Callable[[int], None] = lambda _: None
    """Called after each step with the number of steps done."""


NOBODY = Overseer()


class StopWatch:
    """Poller of the requests in the run's folder (about once a second) and of the overseer (at every step)."""

    def __init__(self, run_folder: Path, overseer: Overseer = NOBODY) -> None:
        self._folder, self._overseer, self._next, self._asked = run_folder, overseer, 0.0, False

    def asked(self) -> Asked:
        """Return this rank's requests after the current step."""
        now = time.monotonic()
        if not self._asked and now >= self._next:
            self._next = now + _LOOK_S
            self._asked = asked_to_stop(self._folder) or asked_to_yield(self._folder)
        save, stop = self._overseer.asks()
        return Asked(save, stop or self._asked)
