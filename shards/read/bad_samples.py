"""Collector of the samples that a process left out because their bytes are damaged."""

import logging
import threading

from shards.errors import BadSampleError, ShardError

LOG = logging.getLogger(__name__)


class BadSamples:
    """Damaged samples of one data set; safe to share between threads and between loaders."""

    def __init__(self) -> None:
        self._messages: dict[int, str] = {}
        self._lock = threading.Lock()

    def add(self, row: int, error: BadSampleError, most: int) -> None:
        """Record a damaged sample and log a warning; a sample counts once, however often it is read.

        Raise `ShardError` if there are now more than `most`.
        """
        with self._lock:
            known = row in self._messages
            self._messages[row] = str(error)
            count = len(self._messages)
            last = list(self._messages.values())[-3:]
        if count > most:
            if most == 0:
                raise error
            raise ShardError(
                f"{count} bad samples, expected at most {most} (max_bad_samples); the last ones: {'; '.join(last)}"
            ) from error
        if not known:
            LOG.warning("left out, %d of at most %d bad samples: %s", count, most, error)

    def lines(self) -> tuple[str, ...]:
        """Return one message per damaged sample."""
        with self._lock:
            return tuple(self._messages.values())
