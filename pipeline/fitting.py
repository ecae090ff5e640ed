"""Ray Train's fit in a thread, while the main thread watches the run and hears who wants it to stop.

The first Ctrl-C or SIGTERM asks the workers to save after the step they are at (`pipeline/stopping.py`). A second one, or
none of them answering in time, ends them at once, which costs the steps since the last checkpoint. Whatever fails from
then on is part of the stop: a scheduler that signals all processes of a job ends Ray and its workers as well.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from pipeline import attempts
from pipeline.errors import Interrupted, PipelineError, TrainingError, first_line
from pipeline.mlflow_store import connect
from pipeline.stopping import ask_to_stop, asked_to_stop, withdraw
from shards.errors import ShardError

GRACE_S = 45.0  # a stopped job is killed after 60 s (`jobs/submit.py`)
_FATAL = "fatal.json"
_LOOK_S = 0.2


@dataclass(frozen=True)
class Workers:
    """What the driver knows of the workers without asking them. By default nothing."""

    gone: Callable[[], bool] = lambda: False
    """Whether they have ended for certain, although `fit` may not have noticed."""
    saved: Callable[[], int | None] = lambda: None
    """The newest step that is saved."""


def fit_and_follow(
    fit: Callable[[], Any], run_id: str, folder: Path, say: Callable[[str], None], workers: Workers | None = None
) -> None:
    """Call `fit` and follow the run on stderr until it returns.

    Raises `Interrupted` where the run was stopped, `TrainingError` in the workers' own words where it failed; an error
    that trying again cannot mend is raised as soon as a worker leaves word of it.
    """
    (folder / _FATAL).unlink(missing_ok=True)
    attempts.forget(folder)
    withdraw(folder)
    fitting: Future[None] = Future()
    with _following(run_id), _signals() as heard:
        threading.Thread(target=_fill, args=(fitting, fit), name="fit", daemon=True).start()
        _wait(fitting, folder, heard, say, workers or Workers())
    _raise_fatal(folder, heard, say)
    if error := fitting.exception():
        if heard:
            raise Interrupted("interrupted") from error
        raise TrainingError(_explain(error, folder)) from error
    if asked_to_stop(folder):
        raise Interrupted("stopped at a checkpoint")


def leave_word(folder: Path, message: str, rank: int) -> None:
    """A worker says why trying again is in vain: whole or absent, and the first rank's word stands."""
    aside = folder / f"{_FATAL}.{rank}"
    # Where the folder is not there, or its disk is full, the driver hears of it from Ray, after it has tried again.
    with suppress(OSError):
        aside.write_bytes(msgspec.json.encode({"message": message}))
        if not (folder / _FATAL).exists():
            aside.rename(folder / _FATAL)


def _wait(fitting: Future[None], folder: Path, heard: list[int], say: Callable[[str], None], workers: Workers) -> None:
    """Until fit is over; raises where the workers are to be ended."""
    deadline = None
    while not fitting.done():
        time.sleep(_LOOK_S)
        _raise_fatal(folder, heard, say)
        if heard and deadline is None:
            if not attempts.begun(folder):
                raise Interrupted("interrupted before training began")
            ask_to_stop(folder)
            say("stopping: the workers save after the step they are at; once more ends them at once")
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            say(f"the workers did not answer within {GRACE_S:g} s: {_kept(workers)}")
            raise Interrupted("interrupted")
        if heard and workers.gone():
            say(f"the workers ended before they could save: {_kept(workers)}")
            raise Interrupted("interrupted")
        if len(heard) > 1:
            raise Interrupted("interrupted")


def _kept(workers: Workers) -> str:
    try:
        step = workers.saved()
    except (OSError, PipelineError, ShardError) as error:
        return f"what is saved cannot be seen now ({first_line(error)})"
    return "no step is saved yet" if step is None else f"the newest saved step is {step}"


def _fill(fitting: Future[None], fit: Callable[[], Any]) -> None:
    try:
        fit()
        fitting.set_result(None)
    except BaseException as error:
        fitting.set_exception(error)


@contextmanager
def _following(run_id: str) -> Iterator[None]:
    from pipeline.follow import follow

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
    """The signals to stop that come while the block runs; none in a thread, which cannot hear them."""
    heard: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in numbers}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _raise_fatal(folder: Path, heard: list[int], say: Callable[[str], None]) -> None:
    path = folder / _FATAL
    if not path.exists():
        return
    message = msgspec.json.decode(path.read_bytes(), type=dict[str, str])["message"]
    if heard:
        say(f"the workers failed while they were to stop: {message}")
        raise Interrupted("interrupted")
    raise TrainingError(message)


def _explain(error: BaseException, folder: Path) -> str:
    """The workers' own words, one line: Ray wraps them in its account of the group."""
    if hasattr(error, "worker_failures") and (word := attempts.last_word(folder)):
        return word.why
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"training failed: {lines[-1]}"
