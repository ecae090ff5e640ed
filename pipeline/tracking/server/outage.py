"""Outages of MLflow: what a person reads of them, and work that waits until they are over."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from pipeline.errors import TrackingAway
from pipeline.tracking.server.answers import is_refused_login, reason

T = TypeVar("T")
KEPT = "training continues, nothing is lost"
_AGAIN_S = 5.0


class Outage:
    """Outage of MLflow as a follower of a run notices it; `comfort` says what becomes of the run meanwhile."""

    def __init__(self, comfort: str = "", now: Callable[[], datetime] = datetime.now) -> None:
        self._comfort, self._now = comfort, now
        self._since: datetime | None = None
        self.text = ""
        """Line about the outage, empty while MLflow answers."""

    def failed(self, error: BaseException) -> str:
        """Record that MLflow did not answer, and return the line about it if this outage has just begun."""
        if self._since is not None:
            return ""
        self._since = self._now()
        does = "refuses the login" if is_refused_login(error) else "does not answer"
        self.text = f"MLflow {does} since {self._since:%H:%M} ({reason(error)})"
        if self._comfort:
            self.text += f"; {self._comfort}"
        return self.text

    def answered(self) -> str:
        """Record that MLflow answered, and return the line about the end of an outage if there was one."""
        if self._since is None:
            return ""
        seconds = (self._now() - self._since).total_seconds()
        self._since, self.text = None, ""
        return f"MLflow answers again after {duration(seconds)}"


def duration(seconds: float) -> str:
    """Return seconds below a minute and minutes above as text."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def outlast(act: Callable[[], T], what: str, patience_s: float, say: Callable[[str], None]) -> T:
    """Return what `act` returns, called again while it raises `TrackingAway`, for `patience_s` seconds.

    `say` gets a line that `what` waits, and one when it does not wait any longer.
    """
    began: float | None = None
    while True:
        try:
            result = act()
        except TrackingAway as error:
            now = time.monotonic()
            if began is None:
                if patience_s <= 0:
                    raise
                began = now
                say(f"{error}; {what} waits for it, {duration(patience_s)} at most (Ctrl-C leaves that for later)")
            left = began + patience_s - now
            if left <= 0:
                raise
            time.sleep(min(_AGAIN_S, left))
        else:
            if began is not None:
                say(f"MLflow answers again after {duration(time.monotonic() - began)}")
            return result
