"""Requests to the training loop, and the hooks of its caller."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

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
    """Callbacks of the code that started the loop: its requests, and a call after each step. By default neither."""

    asks: Callable[[], Request] = lambda: NO_REQUEST
    """Return further requests of rank 0; called at every step."""
    stepped: Callable[[int], None] = lambda _: None
    """Called after each step with the number of steps done."""


NO_HOOKS = LoopHooks()


class RequestPoller:
    """Poller of the requests in the run's folder (about once a second) and of the overseer (at every step)."""

    def __init__(self, run_folder: Path, overseer: LoopHooks = NO_HOOKS) -> None:
        self._folder, self._overseer, self._next, self._asked = run_folder, overseer, 0.0, False

    def asked(self) -> Request:
        """Return this rank's requests after the current step."""
        now = time.monotonic()
        if not self._asked and now >= self._next:
            self._next = now + _LOOK_S
            self._asked = stop_requested(self._folder) or handover_requested(self._folder)
        save, stop = self._overseer.asks()
        return Request(save, stop or self._asked)
