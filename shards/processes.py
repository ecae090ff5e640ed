"""Work spread over processes of this machine: results in order, a live count, and a clean end in every case.

Processes are spawned and never forked: a fork of a process with threads, or of one that uses Ray, may hang.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from shards.errors import ShardError

P = TypeVar("P")
R = TypeVar("R")
_POLL_S = 0.1
_AHEAD = 2  # parts per process that are ready or under way


class _Stopped(Exception):
    """The parent wants no more of it."""


def process_map(
    function: Callable[[P, Callable[[int], None]], R],
    parts: Iterable[P],
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[R]:
    """``function(part, done)`` of every part, in order, in ``workers`` processes; both must be picklable.

    What the function tells ``done`` (how much it has got through) is added up for ``progress``, which is called here.
    Closing the iterator ends the processes within one ``done``. Raises ShardError where a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    window = _AHEAD * workers
    # Each part under way counts in a slot of its own: a lock would stay locked when its holder is killed.
    counts, stop = context.RawArray("q", window), context.RawValue("b", 0)
    executor = ProcessPoolExecutor(workers, context, initializer=_enter, initargs=(counts, stop))
    waiting: deque[tuple[Future[R], int]] = deque()
    before = 0
    try:
        for number, part in enumerate(parts):
            if len(waiting) == window:
                before = yield from _next(waiting, counts, before, progress)
            with _interrupts_blocked():
                waiting.append((executor.submit(_run, function, part, number % window), number % window))
        while waiting:
            before = yield from _next(waiting, counts, before, progress)
    except BrokenProcessPool:
        raise ShardError(
            "a worker process was killed (by the system, if memory ran out); finished shards are kept: run the same "
            "command again, with fewer --workers if memory is short"
        ) from None
    finally:
        stop.value = 1
        executor.shutdown(cancel_futures=True)


def _next(
    waiting: deque[tuple[Future[R], int]], counts: Any, before: int, progress: Callable[[int], None]
) -> Generator[R, None, int]:
    future, slot = waiting[0]
    while not future.done():
        wait([future], timeout=_POLL_S)
        progress(before + sum(counts))
    result = future.result()
    waiting.popleft()
    before += counts[slot]
    counts[slot] = 0
    progress(before + sum(counts))
    yield result
    return before


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started here inherit that they are deaf to Ctrl-C, which is for the parent to answer."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_counts: Any = None
_stop: Any = None


def _enter(counts: Any, stop: Any) -> None:
    global _counts, _stop
    _counts, _stop = counts, stop
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(function: Callable[[Any, Callable[[int], None]], R], part: Any, slot: int) -> R:
    def done(count: int) -> None:
        _counts[slot] += count
        if _stop.value:
            raise _Stopped

    return function(part, done)
