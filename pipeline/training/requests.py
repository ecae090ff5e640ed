"""Requests to the training loop, and the hooks of its caller."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.checkpoint.location import Location
from pipeline.run_folder import handover_requested, stop_requested

_LOOK_S = 1.0  # not at every step: the folder may be on a file system that many nodes share


class Request(NamedTuple):
    """Requests to all ranks after a step; one rank is enough to make them."""

    save: bool = False
    """Write a checkpoint now, besides those that are due."""
    stop: bool = False
    """Write a checkpoint and return."""


NO_REQUEST = Request()


@dataclass(frozen=True)
class LoopHooks:
    """Callbacks of the code that started the loop: its requests, a call after each step, and one before each record.

    By default none of them does anything.
    """

    request: Callable[[], Request] = lambda: NO_REQUEST
    """Return further requests of rank 0; called at every step."""
    stepped: Callable[[int], None] = lambda _: None
    """Called after each step with the number of steps done."""
    keep_unsent: Callable[[], None] = lambda: None
    """Keep beside the run what its tracking server has not taken yet, or raise `OSError`.

    Called on rank 0, in any thread, before the loop records something that is not computed again: before a checkpoint
    is complete, and before its metrics are written.
    """


NO_HOOKS = LoopHooks()


class RequestPoller:
    """Poller of the requests in the run's folder (about once a second) and of its caller (at every step)."""

    def __init__(self, run_folder: Location, hooks: LoopHooks = NO_HOOKS) -> None:
        self._folder, self._hooks, self._next, self._stop = run_folder, hooks, 0.0, False

    def poll(self) -> Request:
        """Return this rank's requests after the current step."""
        now = time.monotonic()
        if isinstance(self._folder, Path) and not self._stop and now >= self._next:
            self._next = now + _LOOK_S
            self._stop = stop_requested(self._folder) or handover_requested(self._folder)
        save, stop = self._hooks.request()
        return Request(save, stop or self._stop)
