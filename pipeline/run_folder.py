"""The folder of a run, `STORAGE/NAME-ID/`: the names in it, and the notes that processes write there for each other.

    name                  written by                                          read by

    initial.safetensors   driver, before workers start                        workers, if there is no checkpoint
    checkpoints/          all ranks; background evaluation adds metrics       workers, evaluation, registration
    saved                 rank 0, after each checkpoint: its step             workers; `detr resume`
    spool/                rank 0: events and pictures for MLflow              its sender thread; at the end the driver
    spool-evaluation/     background evaluation: the same                     its sender thread; at the end the driver
    driver.lock           driver, which locks it while it works               another driver, which is refused
    stop                  driver, after Ctrl-C or SIGTERM                     rank 0, background evaluation, driver
    yield                 Ray's controller, before a resize                   rank 0, which saves and deletes it
    fatal.json            first worker with an error that would recur         driver, which ends the run
    attempts/             workers and Ray's controller: starts and ends       next attempt, driver
    events/               rank 0: one file per step that the guard handled    guard, which counts them; users
    ray/                  Ray Train                                           Ray Train

With `checkpoint.store` the checkpoints are there instead. The driver deletes `stop`, `yield`, `fatal.json` and
`attempts/` when it starts. ARCHITECTURE.md has the same table.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from pipeline.errors import RunConfigError, TrainingError

INITIAL_NAME = "initial.safetensors"
CHECKPOINTS = "checkpoints"
SAVED = "saved"
SPOOL = "spool"
EVALUATION_SPOOL = "spool-evaluation"
ATTEMPTS = "attempts"
EVENTS = "events"
RAY = "ray"
_LOCK = "driver.lock"
_STOP = "stop"
_HANDOVER = "yield"
_FATAL = "fatal.json"


def scratch(run_id: str) -> Path:
    """Return a folder of this node for what the run's processes here share, with access for this user alone.

    It is below `DETR_SCRATCH`, or else below the folder for temporary files. It does not outlive the node, and no other
    node sees it. Raise `RunConfigError` if it cannot be made or belongs to another user.
    """
    given = os.environ.get("DETR_SCRATCH")
    own = Path(given) if given else Path(tempfile.gettempdir()) / f"detr-{os.getuid()}"
    folder = own / run_id
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        # Others may make folders where temporary files are; a link of theirs would lead to a folder of ours.
        owners = {path.lstat().st_uid for path in ([folder] if given else [own, folder])}
        problem = "belongs to another user" if owners != {os.getuid()} or (own.is_symlink() and not given) else ""
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
    if problem:
        raise RunConfigError(
            f"{folder} {problem} on {platform.node()}; expected a folder on this node's disk for this user alone: set "
            "DETR_SCRATCH to another"
        )
    return folder


def request_stop(run_folder: Path) -> None:
    """Ask the workers to save and stop."""
    (run_folder / _STOP).touch()


def stop_requested(run_folder: Path) -> bool:
    """Return True if the workers are asked to stop."""
    return (run_folder / _STOP).exists()


def clear_notes(run_folder: Path) -> None:
    """Delete the requests, the fatal error and the records of attempts of an earlier driver."""
    for name in (_STOP, _HANDOVER, _FATAL):
        (run_folder / name).unlink(missing_ok=True)
    shutil.rmtree(run_folder / ATTEMPTS, ignore_errors=True)


def request_handover(run_folder: Path) -> None:
    """Ask the workers to save and return, because other workers will replace them."""
    (run_folder / _HANDOVER).touch()


def handover_requested(run_folder: Path) -> bool:
    """Return True if the workers are asked to hand over and have not done so."""
    return (run_folder / _HANDOVER).exists()


def clear_handover(run_folder: Path) -> None:
    """Clear the handover request: the workers have saved, or the wait for them is over."""
    (run_folder / _HANDOVER).unlink(missing_ok=True)


class BusyError(TrainingError):
    """Raised if another driver is working on the run."""


@contextmanager
def only_driver(folder: Path, run_id: str) -> Iterator[None]:
    """Hold the lock of the run's folder; raise `BusyError` if another driver has it.

    Two drivers would write the same spool and delete each other's unfinished checkpoints. A kill releases the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise BusyError(
                f"run {run_id[:8]} is being trained by {file.read().strip() or 'another process'}; expected one "
                "driver: wait for it, or stop it first"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def write_fatal_error(folder: Path, message: str) -> None:
    """Tell the driver to end the run instead of restarting it; the first worker to write wins."""
    # If the folder is missing or its disk is full, the driver learns of the error from Ray, after the restarts.
    with suppress(OSError):
        write_once(folder / _FATAL, msgspec.json.encode({"message": message}))


def read_fatal_error(folder: Path) -> str | None:
    """Return the message of `write_fatal_error`, or None."""
    path = folder / _FATAL
    return msgspec.json.decode(path.read_bytes(), type=dict[str, str])["message"] if path.exists() else None


def write_once(path: Path, content: bytes) -> None:
    """Write a file atomically, unless it exists already."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    temporary.write_bytes(content)
    try:
        os.link(temporary, path)  # unlike a rename, it does not replace an existing file
    except FileExistsError:
        pass
    finally:
        temporary.unlink()
