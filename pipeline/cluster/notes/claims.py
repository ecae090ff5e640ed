"""Claims of Ray Train's controllers on the resources of the cluster, and the removal of those of dead drivers.

Ray's autoscaling coordinator reserves resources for a controller and keeps them for three minutes after the controller
died, in which an elastic run finds none on a free cluster. So each controller leaves a record with the Ray job that it
belongs to; the next driver, of whichever run, cancels the claims of jobs that have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from contextlib import suppress

from pipeline.cluster.notes.notes import NoteStore

_CLAIMS = "claims/"


def record_claim(store: NoteStore, requester: str, job: str) -> None:
    """Record that a controller of the Ray job `job` claims resources as `requester`."""
    with suppress(OSError):  # at worst a later run waits
        store.put(_CLAIMS + requester, job.encode(), overwrite=True)


def cancel_dead_claims(store: NoteStore, alive: Callable[[], Set[str]], cancel: Callable[[str], None]) -> int:
    """Call `cancel` with each requester whose job is not `alive()`, and delete its record; return their number."""
    try:
        claims = store.get_all(_CLAIMS)
        running = alive() if claims else set()
        dead = [key for key, job in claims.items() if job.decode() not in running]
        for key in dead:
            cancel(key.removeprefix(_CLAIMS))
            store.delete(key)
    except OSError:
        return 0
    return len(dead)
