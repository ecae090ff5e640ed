"""Detection of hung workers from the positions of their threads."""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pipeline
from pipeline.cluster.hang_watch import HangWatch, ThreadPosition, diagnose, thread_position
from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.notes import Notes
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.training.step import train_step

ROOT = Path(pipeline.__file__).parents[1]
IN_SUM = ThreadPosition(12, "sum (pipeline/distributed/ranks.py:50)", True)
IN_DATA = ThreadPosition(12, "next (shards/read/loader.py:99)", False)


@pytest.mark.parametrize(
    ("positions", "report"),
    [
        ({0: IN_SUM, 1: None, 2: IN_SUM}, "worker 1 does not respond"),
        ({0: IN_SUM, 1: IN_SUM, 2: IN_DATA}, r"worker 2 hangs in next \(shards/read/loader.py:99\)"),
        (
            {0: IN_SUM, 1: ThreadPosition(11, "sum (pipeline/distributed/ranks.py:50)", True)},
            r"worker 1 hangs in sum \(pipeline/distributed/ra.*\)",
        ),
        ({0: IN_SUM, 1: IN_SUM}, r"the workers wait for each other, worker 0 in sum \(.*\), worker 1 in sum \(.*\)"),
        ({0: IN_DATA, 1: IN_DATA}, "the workers wait for each other, worker 0 in next .*"),
        (
            {0: IN_SUM} | dict.fromkeys(range(1, 9)),
            "worker 1 does not respond, .*, worker 4 does not respond and 4 more",
        ),
    ],
)
def test_the_report_names_the_hung_workers(positions: dict[int, ThreadPosition | None], report: str) -> None:
    line = diagnose(positions, 480.2)
    assert re.fullmatch(report + "; no step has ended for 480 s, the last was step 12", line), line


def called_through(*files: tuple[str, str]) -> ThreadPosition:
    """Return the position in the last of these functions, (path, name), each of which calls the next."""
    call: Callable[[], ThreadPosition] = lambda: thread_position(sys._getframe(1), 3)  # noqa: E731
    for path, name in reversed(files):
        scope: dict[str, Any] = {"call": call}
        exec(compile(f"def {name}():\n    return call()", str(ROOT / path), "exec"), scope)
        call = scope[name]
    return call()


def test_the_position_is_our_innermost_function() -> None:
    loop, reading = ("pipeline/training/loop.py", "_train"), ("shards/read/loader.py", "taken")
    assert called_through(loop, reading) == ThreadPosition(3, "taken (shards/read/loader.py:2)", False)
    assert called_through(loop, reading, ("lib/queue.py", "get")) == ThreadPosition(
        3, "taken (shards/read/loader.py:2)", False
    )
    assert called_through(("lib/queue.py", "get")).where == "no code of ours"


@pytest.mark.parametrize(
    "deeper",
    [
        [("pipeline/distributed/ranks.py", "sum"), ("torch/distributed/distributed_c10d.py", "all_reduce")],
        [("pipeline/training/step.py", "_pass"), ("torch/autograd/graph.py", "_engine_run_backward")],
    ],
)
def test_collectives_and_the_backward_pass_count_as_waiting(deeper: list[tuple[str, str]]) -> None:
    assert called_through(("pipeline/training/loop.py", "_train"), *deeper).waits


def test_the_step_function_counts_as_waiting(tiny_config: RunConfig) -> None:
    positions: list[ThreadPosition] = []

    def record(_: str) -> None:
        positions.append(thread_position(sys._getframe(1), 3))
        raise InterruptedError

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(InterruptedError):
        train_step(model, [], optimizer, tiny_config, Ranks(), 3, lap=record)
    assert positions[0].where.startswith("train_step (pipeline/training/step.py:")
    assert positions[0].waits


def test_a_hang_report_is_withdrawn_when_the_worker_continues(notes: Notes) -> None:
    attempts.start_attempt(notes, 2)
    watch = HangWatch(notes, 0, 2, 0.5)
    try:
        watch.stepped(7)
        until = time.monotonic() + 60
        while (reason := attempts.end_reason(notes)) is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert reason.why.startswith("worker 1 does not respond; no step has ended for ")
        watch.stepped(8)
        while attempts.end_reason(notes) is not None:
            assert time.monotonic() < until
            watch.stepped(9)
            time.sleep(0.02)
        assert attempts.read_positions(notes, 2, ThreadPosition) == {0: None, 1: None}
    finally:
        watch.close()
