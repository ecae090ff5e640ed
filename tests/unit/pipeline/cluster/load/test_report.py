"""Report of the load of several nodes through the tracker of rank 0."""

import time
from contextlib import ExitStack

from pipeline.cluster.load.report import LoadReport
from tests.support.notes import MemoryNotes, memory_notes
from tests.support.tracker import MemoryTracker
from tests.support.tracking_server import wait_for


def names(tracker: MemoryTracker) -> set[str]:
    return {name for name, _, _ in tracker.points}


def test_rank_0_reports_the_load_of_every_node_by_the_age_of_the_run() -> None:
    notes, tracker = memory_notes(), MemoryTracker()
    with ExitStack() as stack:
        for rank, node in enumerate("ab"):
            report = LoadReport(
                notes,
                rank,
                lambda node=node: {f"{node}/cpu": 50.0},
                None if rank else tracker,
                began=time.time() - 3600,
                every_s=0.01,
            )
            stack.callback(report.close)
        wait_for(lambda: names(tracker) == {"system/a/cpu", "system/b/cpu"})
    steps = [step for _, _, step in tracker.points]
    assert min(steps) >= 3600
    assert max(steps) < 3700


def test_a_worker_that_has_ended_is_not_reported_again() -> None:
    notes, tracker = memory_notes(), MemoryTracker()
    gone = LoadReport(notes, 1, lambda: {"b/cpu": 50.0}, None, began=0, every_s=0.001)
    wait_for(lambda: bool(notes.read_all("load/")))
    gone.close()
    report = LoadReport(notes, 0, lambda: {"a/cpu": 50.0}, tracker, began=time.time() - 5, every_s=0.001)
    wait_for(lambda: len(tracker.points) > 0)
    report.close()
    assert names(tracker) == {"system/a/cpu"}


def test_neither_a_driver_that_raises_nor_an_absent_head_ends_the_report() -> None:
    notes, tracker = memory_notes(), MemoryTracker()
    assert isinstance(notes.store, MemoryNotes)
    notes.store.away = True
    calls: list[int] = []

    def sample() -> dict[str, float]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("NVML is gone")
        return {"a/cpu": 1.0}

    report = LoadReport(notes, 0, sample, tracker, began=time.time() - 5, every_s=0.001)
    wait_for(lambda: len(tracker.points) > 0)
    report.close()
