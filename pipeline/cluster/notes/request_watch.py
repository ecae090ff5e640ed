"""Watch for requests of the driver and of Ray's controller, in a thread beside the training loop."""

from __future__ import annotations

import threading
from collections.abc import Callable

_LOOK_S = 1.0


class RequestWatch:
    """Thread that looks about once a second whether the workers are asked to stop, until it is closed.

    The training thread reads only what was found last, so it never waits for a cluster that does not answer.
    """

    def __init__(self, requested: Callable[[], bool], look_s: float = _LOOK_S) -> None:
        self._requested, self._look_s = requested, look_s
        self._found, self._closed = threading.Event(), threading.Event()
        threading.Thread(target=self._watch, name="requests", daemon=True).start()

    @property
    def stop(self) -> bool:
        """True once the workers are asked to save and return."""
        return self._found.is_set()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.is_set():
            if self._requested():
                self._found.set()
                return
            self._closed.wait(self._look_s)
