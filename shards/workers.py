"""Maps over the processes and threads of this machine."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from shards.errors import ShardError

P = TypeVar("P")
R = TypeVar("R")
T = TypeVar("T")
# Called with (number done, number in total), never from two threads at once.
Progress = Callable[[int, int], None]
_POLL_S = 0.1
_AHEAD = 2  # items per process that are submitted and not yet yielded


class _Stopped(Exception):
    """Raised in a worker process when the parent has stopped the map."""


def process_map(
    function: Callable[[P, Callable[[int], None]], R],
    items: Iterable[P],
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[R]:
    """Yield `function(item, done)` of every item, in order, from `workers` processes; both must be picklable.

    The function calls `done` with increments of its progress; `progress` is called in this process with their sum.
    Closing the iterator ends the processes at their next call of `done`. Raise `ShardError` when a process was killed.
    """
    context = multiprocessing.get_context("spawn")
    window = _AHEAD * workers
    # Each submitted item has its own counter: a lock would stay locked when its holder is killed.
    counts, stop = context.RawArray("q", window), context.RawValue("b", 0)
    executor = ProcessPoolExecutor(workers, context, initializer=_enter, initargs=(counts, stop))
    pending: deque[tuple[Future[R], int]] = deque()
    before = 0
    try:
        for number, item in enumerate(items):
            if len(pending) == window:
                before = yield from _next(pending, counts, before, progress)
            with _interrupts_blocked():
                pending.append((executor.submit(_run, function, item, number % window), number % window))
        while pending:
            before = yield from _next(pending, counts, before, progress)
    except BrokenProcessPool:
        raise ShardError(
            "a worker process was killed (by the system, if memory ran out); finished shards are kept: run the same "
            "command again, with fewer --workers if memory is short"
        ) from None
    finally:
        stop.value = 1
        executor.shutdown(cancel_futures=True)


def _next(
    pending: deque[tuple[Future[R], int]], counts: Any, before: int, progress: Callable[[int], None]
) -> Generator[R, None, int]:
    """Yield the result of the first pending item; return the progress of all items that are finished."""
    future, slot = pending[0]
    while not future.done():
        wait([future], timeout=_POLL_S)
        progress(before + sum(counts))
    result = future.result()
    pending.popleft()
    before += counts[slot]
    counts[slot] = 0
    progress(before + sum(counts))
    yield result
    return before


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block SIGINT in the processes started here, so that only the parent handles Ctrl-C."""
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


def _run(function: Callable[[Any, Callable[[int], None]], R], item: Any, slot: int) -> R:
    def done(count: int) -> None:
        _counts[slot] += count
        if _stop.value:
            raise _Stopped

    return function(item, done)


def thread_map(function: Callable[[T], R], items: Sequence[T], workers: int, progress: Progress | None) -> list[R]:
    """Return `function` of every item, in order, from `workers` threads; 0 runs in the calling thread.

    For work that mostly waits, such as reading many small files. `progress` counts items.
    """
    executor = ThreadPoolExecutor(max(1, workers), thread_name_prefix="convert")
    results: list[R] = []
    try:
        for result in executor.map(function, items) if workers else map(function, items):
            results.append(result)
            if progress is not None:
                progress(len(results), len(items))
    finally:
        executor.shutdown(cancel_futures=True)
    return results
