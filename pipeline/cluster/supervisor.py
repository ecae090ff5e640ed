"""Supervision of the workers: `trainer.fit` runs in a thread; the main thread follows the run and handles signals.

The first Ctrl-C or SIGTERM asks the workers to save after their current step. After a second one, or when they do not
answer in time, they are ended at once, which costs the steps since the last checkpoint. After a signal every failure
counts as part of the stop, because a scheduler that signals all processes of a job ends Ray and its workers as well.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster import attempts
from pipeline.errors import Interrupted, PipelineError, TrainingError
from pipeline.run_folder import clear_notes, read_fatal_error, request_stop, stop_requested
from pipeline.tracking.mlflow_client import connect
from shards.errors import ShardError, one_line

GRACE_S = 45.0  # Ray kills a stopped job after 60 s
_LOOK_S = 0.2


@dataclass(frozen=True)
class WorkerStatus:
    """Facts about the workers that the driver knows without asking them. By default none."""

    gone: Callable[[], bool] = lambda: False
    """Return True if they have certainly ended, even if `fit` has not noticed."""
    saved: Callable[[], int | None] = lambda: None
    """Return the newest saved step, or None."""


def supervise(
    fit: Callable[[], Any],
    run_id: str,
    folder: Path,
    say: Callable[[str], None],
    workers: WorkerStatus | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Call `fit` and follow the run on stderr until it returns.

    Raise `Interrupted` when the run was stopped, and `TrainingError` with the workers' message when it failed. A fatal
    error, which a restart cannot repair, is raised as soon as a worker has written it. Workers that are asked to stop
    have `grace_s` seconds to save.
    """
    clear_notes(folder)
    result: Future[None] = Future()
    with _following(run_id), _signals() as received:
        threading.Thread(target=_call, args=(result, fit), name="fit", daemon=True).start()
        _wait(result, folder, received, say, workers or WorkerStatus(), grace_s)
    _raise_fatal(folder, received, say)
    if error := result.exception():
        if received:
            raise Interrupted("interrupted") from error
        raise TrainingError(_explain(error, folder)) from error
    if stop_requested(folder):
        raise Interrupted("stopped at a checkpoint")


def _wait(
    result: Future[None],
    folder: Path,
    received: list[int],
    say: Callable[[str], None],
    workers: WorkerStatus,
    grace_s: float,
) -> None:
    """Wait for the end of `fit`; raise when the workers must be ended now."""
    deadline = None
    while not result.done():
        time.sleep(_LOOK_S)
        _raise_fatal(folder, received, say)
        if received and deadline is None:
            if not attempts.has_started(folder):
                raise Interrupted("interrupted before training began")
            request_stop(folder)
            say("stopping: the workers save after their current step; a second signal ends them at once")
            deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            say(f"the workers did not answer within {grace_s:g} s: {_kept(workers)}")
            raise Interrupted("interrupted")
        if received and workers.gone():
            say(f"the workers ended before they could save: {_kept(workers)}")
            raise Interrupted("interrupted")
        if len(received) > 1:
            raise Interrupted("interrupted")


def _kept(workers: WorkerStatus) -> str:
    try:
        step = workers.saved()
    except (OSError, PipelineError, ShardError) as error:
        return f"the checkpoints cannot be listed now ({one_line(error)})"
    return "no step is saved yet" if step is None else f"the newest saved step is {step}"


def _call(result: Future[None], fit: Callable[[], Any]) -> None:
    try:
        fit()
        result.set_result(None)
    except BaseException as error:
        result.set_exception(error)


@contextmanager
def _following(run_id: str) -> Iterator[None]:
    from pipeline.display.follow import follow

    stop = threading.Event()
    watcher = threading.Thread(
        target=follow, args=(connect(), run_id, sys.stderr), kwargs={"stop": stop}, name="follow", daemon=True
    )
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(10)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield a list of the stop signals received inside the block; it stays empty outside the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_fatal(folder: Path, received: list[int], say: Callable[[str], None]) -> None:
    message = read_fatal_error(folder)
    if message is None:
        return
    if received:
        say(f"the workers failed while they were stopping: {message}")
        raise Interrupted("interrupted")
    raise TrainingError(message)


def _explain(error: BaseException, folder: Path) -> str:
    """Return one line: the reason that the workers recorded, or the last line of Ray's error."""
    reason = attempts.end_reason(folder)
    if hasattr(error, "worker_failures") and reason:
        return reason.why
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"training failed: {lines[-1]}"
