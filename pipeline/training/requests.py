"""Requests to the training loop, and the hooks of its caller."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


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
    """Return the requests of the driver and the cluster; called on rank 0 at every step, so it must not block."""
    stepped: Callable[[int], None] = lambda _: None
    """Called after each step with the number of steps done."""
    keep_unsent: Callable[[], None] = lambda: None
    """Keep beside the run what its tracking server has not taken yet, or raise `OSError`.

    Called on rank 0, in any thread, before the loop records something that is not computed again: before a checkpoint
    is complete, and before its metrics are written.
    """


NO_HOOKS = LoopHooks()
