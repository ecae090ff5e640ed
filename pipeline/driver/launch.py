"""Options of the driver, which do not change the result of a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

Say = Callable[[str], None]


def say(text: str) -> None:
    """Print a line for the user, unbuffered even if stdout is a file."""
    print(text, flush=True)


@dataclass(frozen=True)
class Launch:
    """Options of the driver that do not change the result of a run."""

    address: str | None = None
    """Address of a Ray cluster (`auto`, `HOST:6379` or `ray://...`). None: RAY_ADDRESS, or start a local one."""
    verbose: bool = False
    say: Say = say
    began: float = field(default_factory=time.time)
    """Time at which the command began, in seconds since the epoch."""
