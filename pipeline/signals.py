"""Stop signals of a command from its first line on: Ctrl-C and SIGTERM raise `Signalled` in the main thread.

Without this, Python ignores SIGINT in a process that a script has started with `&`, and SIGTERM ends it without a word.
While workers train, `pipeline.cluster.supervisor` handles the signals instead.
"""

from __future__ import annotations

import signal
import time
from typing import Any

_TOGETHER_S = 1.0
"""`timeout` and schedulers signal a process and then its whole group, which is one request to stop."""
_received: list[tuple[int, float]] = []


class Signalled(KeyboardInterrupt):
    """Raised by a stop signal; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def hear_stops() -> None:
    """Raise `Signalled` in the main thread at each SIGINT and SIGTERM from now on, even where they were ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def raise_unheard() -> None:
    """Raise `Signalled` if a signal has come, whose error some library may have caught."""
    if _received:
        raise Signalled(_received[-1][0])


def _stop(number: int, _: Any) -> None:
    now = time.monotonic()
    if _received and now - _received[-1][1] < _TOGETHER_S:
        return
    _received.append((number, now))
    raise Signalled(number)
