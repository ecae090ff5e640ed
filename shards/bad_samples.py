"""Which samples this process left out because their bytes are bad, and when there are too many."""

import functools
import logging
import threading

from shards.errors import BadSampleError, ShardError
from shards.manifest import Manifest

LOG = logging.getLogger(__name__)


class BadSamples:
    """Which samples of a data set this process found bad."""

    def __init__(self) -> None:
        self._said: dict[int, str] = {}
        self._lock = threading.Lock()

    def add(self, row: int, error: BadSampleError, most: int) -> None:
        """Count a sample once, however often it is met; raises ShardError where it is one too many."""
        with self._lock:
            known = row in self._said
            self._said[row] = str(error)
            count, last = len(self._said), list(self._said.values())[-3:]
        if count > most:
            if most == 0:
                raise error
            raise ShardError(
                f"{count} bad samples, expected at most {most} (max_bad_samples); the last ones: {'; '.join(last)}"
            ) from error
        if not known:
            LOG.warning("left out, %d of at most %d bad samples: %s", count, most, error)

    def lines(self) -> tuple[str, ...]:
        """What was said of each."""
        with self._lock:
            return tuple(self._said.values())


@functools.lru_cache(maxsize=16)
def bad_samples(manifest: Manifest) -> BadSamples:
    """Those of one data set, over all loaders of this process."""
    return BadSamples()
