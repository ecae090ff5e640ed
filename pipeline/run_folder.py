"""The folder of a run: every file in it, who writes it, who reads it."""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from pipeline.errors import TrainingError

_STOP = "stop"
_YIELD = "yield"


def request_stop(run_folder: Path) -> None:
    """Ask the workers to save and stop."""
    (run_folder / _STOP).touch()


def stop_requested(run_folder: Path) -> bool:
    """Return True if the workers are asked to stop."""
    return (run_folder / _STOP).exists()


def clear_requests(run_folder: Path) -> None:
    """Delete the requests of an earlier attempt."""
    (run_folder / _STOP).unlink(missing_ok=True)
    clear_handover(run_folder)


def request_handover(run_folder: Path) -> None:
    """Ask the workers to save and return, because other workers will replace them."""
    (run_folder / _YIELD).touch()


def handover_requested(run_folder: Path) -> bool:
    """Return True if the workers are asked to hand over and have not done so."""
    return (run_folder / _YIELD).exists()


def clear_handover(run_folder: Path) -> None:
    """Clear the handover request: the workers have saved, or the wait for them is over."""
    (run_folder / _YIELD).unlink(missing_ok=True)


SPOOL = "spool-evaluation"
"""Folder of the evaluations' spool, beside that of the run."""
SPOOLS = ("spool", SPOOL)


class BusyError(TrainingError):
    """Raised if another driver is working on the run."""


@contextmanager
def only_driver(folder: Path, run_id: str) -> Iterator[None]:
    """Hold the lock of the run's folder; raise `BusyError` if another driver has it.

    Two drivers would write the same spool and delete each other's unfinished checkpoints. A kill releases the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "driver.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise BusyError(
                f"run {run_id[:8]} is being trained by {file.read().strip() or 'another process'}; expected one driver: "
                "wait for it, or stop it first"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


FATAL = "fatal.json"


def write_fatal_error(folder: Path, message: str, rank: int) -> None:
    """Write `fatal.json` so that the driver ends the run instead of restarting it; the first rank to write wins."""
    temporary = folder / f"{FATAL}.{rank}"
    # If the folder is missing or its disk is full, the driver learns of the error from Ray, after the restarts.
    with suppress(OSError):
        temporary.write_bytes(msgspec.json.encode({"message": message}))
        if not (folder / FATAL).exists():
            temporary.rename(folder / FATAL)
