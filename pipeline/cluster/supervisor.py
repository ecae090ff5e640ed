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
from functools import partial
from typing import Any

from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.attempts import EndReason
from pipeline.cluster.notes.notes import FatalError, Notes
from pipeline.errors import Interrupted, Killed, PipelineError, Postponed, TrainingError
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.server.outage import KEPT
from shards.errors import ShardError, one_line

GRACE_S = 45.0  # Ray kills a stopped job after 60 s
_TOGETHER_S = 1.0  # `timeout` and schedulers signal a process and then its group, which is one request to stop
_UNKNOWN = -1
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
    notes: Notes,
    say: Callable[[str], None],
    workers: WorkerStatus | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Call `fit` and follow the run on stderr until it returns.

    Raise `Interrupted` when the run was stopped and has saved, `Killed` when it could not save, and `TrainingError`
    with the workers' message when it failed. That is a `Postponed` if a further try is worth it: the run has saved a
    step since this call, or the workers failed because of what may pass. A fatal error, which a restart cannot repair, is raised as soon as a worker has written
    it. Workers that are asked to stop have `grace_s` seconds to save.
    """
    workers = workers or WorkerStatus()
    began_at = _saved(workers)
    result: Future[None] = Future()
    with _following(run_id), _signals() as received:
        threading.Thread(target=_call, args=(result, fit), name="fit", daemon=True).start()
        _wait(result, notes, received, say, workers, grace_s)
    error, gone = result.exception(), workers.gone()
    if not gone:
        _raise_fatal(notes.read_fatal_error(), received, say)
    if error:
        if received:
            raise Killed(_kept(workers)) from error
        reason = None if gone else attempts.end_reason(notes)
        message, saved = _explain(error, reason), _saved(workers)
        if (reason and reason.passes) or saved == _UNKNOWN or saved not in (None, began_at):
            raise Postponed(f"{message}; {_kept(workers)}") from error
        raise TrainingError(message) from error
    if received:
        raise Interrupted("stopped at a checkpoint")


def _wait(
    result: Future[None],
    notes: Notes,
    received: list[int],
    say: Callable[[str], None],
    workers: WorkerStatus,
    grace_s: float,
) -> None:
    """Wait for the end of `fit`; raise when the workers must be ended now."""
    deadline, said = None, False
    with _Contact(notes) as contact:
        while not result.done():
            time.sleep(_LOOK_S)
            if received and workers.gone():
                say("the workers ended before they could save")
                raise Killed(_kept(workers))
            _raise_fatal(contact.fatal, received, say)
            if received and deadline is None:
                deadline = time.monotonic() + grace_s
                contact.ask_to_stop()
            if contact.asked and not said:
                if contact.idle:
                    raise Interrupted("stopped while no worker ran, so that nothing had to be saved")
                say("stopping: the workers save after their current step; a second signal ends them at once")
                said = True
            if len(received) > 1:
                raise Killed(_kept(workers))
            if deadline is not None and time.monotonic() > deadline:
                say(f"the workers did not answer within {grace_s:g} s")
                raise Killed(_kept(workers))


class _Contact:
    """Thread that exchanges notes with the workers; the main thread does not wait for a cluster that has gone."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self.fatal: FatalError | None = None
        self.asked = False
        """True once the request to stop is in the cluster, and known whether a worker ran then."""
        self.idle = False
        """True if no worker ran then."""
        self._wanted, self._closed = threading.Event(), threading.Event()

    def __enter__(self) -> _Contact:
        threading.Thread(target=self._work, name="notes", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def ask_to_stop(self) -> None:
        """Ask the workers to stop, as soon as the cluster answers."""
        self._wanted.set()

    def _work(self) -> None:
        while not self._closed.wait(_LOOK_S):
            self.fatal = self.fatal or self._notes.read_fatal_error()
            if self._wanted.is_set() and not self.asked and self._notes.request_stop():
                running = attempts.is_running(self._notes)
                self.idle, self.asked = running is False, running is not None


def _saved(workers: WorkerStatus) -> int | None:
    """Return the newest saved step, None before the first, and `_UNKNOWN` if the checkpoints cannot be listed."""
    try:
        return workers.saved()
    except (OSError, PipelineError, ShardError):
        return _UNKNOWN


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
    from pipeline.tracking.mlflow_runs import run_config
    from pipeline.tracking.pages.writer import DescriptionWriter

    stop, client = threading.Event(), connect(check=False)
    describe = DescriptionWriter(client, partial(run_config, client, run_id))
    watcher = threading.Thread(
        target=follow,
        args=(client, run_id, sys.stderr),
        kwargs={"stop": stop, "comfort": KEPT, "seen": describe},
        name="follow",
        daemon=True,
    )
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join(10)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Yield a list of the requests to stop inside the block; it stays empty outside the main thread."""
    received: list[int] = []
    began = -_TOGETHER_S

    def receive(number: int, _: Any) -> None:
        nonlocal began
        now = time.monotonic()
        if now - began >= _TOGETHER_S:  # since the signal that counted: an impatient person signals again and again
            received.append(number)
            began = now

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_fatal(error: FatalError | None, received: list[int], say: Callable[[str], None]) -> None:
    if error is None:
        return
    if received:
        say(f"the workers failed while they were stopping: {error.message}")
        raise Killed("the workers could not save")
    raise (Postponed if error.postpones else TrainingError)(error.message)


def _explain(error: BaseException, reason: EndReason | None) -> str:
    """Return one line: the reason that the workers recorded, or the last line of Ray's error."""
    if hasattr(error, "worker_failures") and reason:
        return reason.why
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"training failed: {lines[-1]}"
