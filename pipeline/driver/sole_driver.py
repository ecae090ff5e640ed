"""The lease of a run, held while a driver works on it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.checkpoint.location import Location
from pipeline.driver.launch import Say
from pipeline.driver.lease import Claims, Lease
from pipeline.errors import BusyError

_SECOND_S = 2.0


@contextmanager
def sole_driver(folder: Location, name: str, say: Say) -> Iterator[Lease]:
    """Hold the lease of the run at `folder` in the block; raise `BusyError` if another driver has it.

    If the lease is lost, this process is asked to stop, and then to stop at once.
    """
    lease = Lease(Claims(folder), name, say=say)
    lease.acquire()
    for holder in lease.dead:
        say(f"{holder}, which worked on run {name}, was killed")
    with lease.kept(_stop_this_process):
        try:
            yield lease
        except (KeyboardInterrupt, SystemExit) as error:
            if not lease.lost:
                raise
            raise BusyError(f"run {name} was {lease.lost}; this process works on it no longer") from error


def _stop_this_process() -> None:
    for wait_s in (_SECOND_S, 0.0):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(wait_s)
