"""Report of the load of all nodes: each worker leaves a note, and rank 0 hands the notes to its tracker.

So the points go through the one spool of the run, and an outage of MLflow costs none. A note is replaced by the next
one, so nothing grows while rank 0 does not read.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping

import msgspec

from pipeline.cluster.notes.notes import Notes
from pipeline.tracking.tracker import Tracker
from shards.errors import one_line

LOG = logging.getLogger(__name__)
SYSTEM = "system"
"""Family of the metrics that MLflow shows in its tab of system metrics."""
_NOTES = "load/"


class _Sample(msgspec.Struct):
    id: str
    """Text that no other sample has."""
    values: dict[str, float]


class LoadReport:
    """Thread of a worker that samples its part of a node every `every_s` seconds.

    `sample` returns the load by name, `NODE/...`; on rank 0, which has the `tracker`, the samples of all workers are
    reported as `system/NODE/...`. Their step is the number of seconds since `began`, the time at which the run did.
    """

    def __init__(
        self,
        notes: Notes,
        rank: int,
        sample: Callable[[], Mapping[str, float]],
        tracker: Tracker | None,
        *,
        began: float,
        every_s: float,
    ) -> None:
        self._notes, self._name, self._sample, self._tracker = notes, f"{_NOTES}{rank}", sample, tracker
        self._began, self._every_s = began, every_s
        self._key, self._number = secrets.token_hex(4), 0
        # What an earlier attempt left is not the load of now.
        self._seen = {note.id for note in self._others()} if tracker else set[str]()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(self._every_s)

    def _run(self) -> None:
        warned = False
        while not self._closed.wait(self._every_s):
            try:
                self._look()
                warned = False
            except Exception as error:
                # The report is only information: whatever a driver or a container raises, training continues.
                if not warned:
                    LOG.warning("the load of this node could not be read: %s", one_line(error))
                warned = True

    def _look(self) -> None:
        own = dict(self._sample())
        self._number += 1
        if self._tracker is None:
            sample = _Sample(f"{self._key}-{self._number}", own)
            self._notes.write(self._name, msgspec.json.encode(sample), overwrite=True)
            return
        others = self._others()
        for note in others:
            if note.id not in self._seen:
                own |= note.values
        self._seen = {note.id for note in others}
        step = int(time.time() - self._began)
        self._tracker.metrics({f"{SYSTEM}/{name}": value for name, value in own.items()}, step)

    def _others(self) -> list[_Sample]:
        """Return the newest sample of each other worker."""
        found = self._notes.read_all(_NOTES) or {}
        return [msgspec.json.decode(note, type=_Sample) for note in found.values()]
