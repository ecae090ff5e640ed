"""The map over processes. Its functions are at module level, as spawned processes import them."""

import os
import signal
import time
from collections.abc import Callable

import psutil
import pytest

from shards.errors import ShardError
from shards.workers import process_map

Done = Callable[[int], None]


def slowest_first(part: int, done: Done) -> tuple[int, int]:
    for _ in range(4):
        time.sleep(0.02 if part == 0 else 0)
        done(1)
    return part, os.getpid()


def fail_on_two(part: int, done: Done) -> int:
    if part == 2:
        raise ShardError("two")
    return part


def die_on_two(part: int, done: Done) -> int:
    if part == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return part


def endless(part: int, done: Done) -> int:
    while True:
        time.sleep(0.01)
        done(1)


def is_deaf(part: int, done: Done) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]


def test_results_are_in_order_and_progress_is_complete():
    counts: list[int] = []
    results = list(process_map(slowest_first, range(9), 2, counts.append))
    assert [item for item, _ in results] == list(range(9))
    assert os.getpid() not in {pid for _, pid in results}
    assert counts == sorted(counts)
    assert counts[-1] == 36
    assert children() == []


def test_items_are_taken_as_they_are_needed():
    made: list[int] = []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    results = process_map(slowest_first, items(), 1, lambda _: None)
    next(results)
    assert len(made) <= 4
    results.close()
    assert children() == []


def test_error_of_an_item_is_raised_unchanged():
    results = process_map(fail_on_two, range(9), 1, lambda _: None)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ShardError, match="two"):
        next(results)
    assert children() == []


def test_killed_process_gives_one_clear_line():
    with pytest.raises(ShardError, match=r"a worker process was killed .*run the same command again") as caught:
        list(process_map(die_on_two, range(9), 2, lambda _: None))
    assert "\n" not in str(caught.value)
    assert children() == []


def test_interrupt_ends_the_processes_within_an_item():
    class Enough(Exception):
        pass

    def progress(count: int) -> None:
        if count > 3:
            raise Enough

    with pytest.raises(Enough):
        list(process_map(endless, range(9), 2, progress))
    assert children() == []


def test_only_the_parent_handles_an_interrupt():
    assert list(process_map(is_deaf, range(2), 1, lambda _: None)) == [True, True]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
