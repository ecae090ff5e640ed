"""Requests and reports of a worker beside the loop."""

import errno
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.train.v2._internal.execution import context
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2.api.preemption import PreemptionInfo
from torch.distributed import DistError

from pipeline.checkpoint import patience
from pipeline.cluster import worker as ray_worker
from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.attempts import EndReason, Restart
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.worker import (
    FirstStepReport,
    PreemptionNotice,
    WorkerJob,
    open_patiently,
    record_failure,
    report_failure,
    with_microbatch_limit,
)
from pipeline.config import ClusterConfig, RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError, RunConfigError
from pipeline.tracking.tags import TAG_RESIZED, TAG_WARNING
from pipeline.training.requests import NO_REQUEST, Request
from shards.store.retry import StoreError
from tests.support.notes import memory_notes
from tests.support.tracker import MemoryTracker


@pytest.fixture
def preemption(monkeypatch: pytest.MonkeyPatch) -> PreemptionContext:
    """Context in which Ray announces that a node will be taken away."""
    preemption = PreemptionContext()
    monkeypatch.setattr(context, "get_train_context", lambda: SimpleNamespace(preemption_context=preemption))
    return preemption


def info(in_s: float | None, node: str = "n") -> PreemptionInfo:
    deadline = None if in_s is None else int((time.time() + in_s) * 1000)
    return PreemptionInfo(deadline_ms=deadline, preempted_node_to_ranks={node: [1]})


def test_nothing_is_requested_while_all_nodes_stay(preemption: PreemptionContext) -> None:
    notice = PreemptionNotice()
    assert [notice.request(), notice.request()] == [NO_REQUEST, NO_REQUEST]


def test_each_announced_node_causes_a_checkpoint(preemption: PreemptionContext) -> None:
    notice = PreemptionNotice()
    preemption.preemption_info = info(None)
    assert [notice.request(), notice.request()] == [Request(save=True), NO_REQUEST]
    preemption.preemption_info = info(5, "m")
    assert [notice.request(), notice.request()] == [Request(save=True), NO_REQUEST]


def test_a_second_checkpoint_comes_shortly_before_the_node_goes(
    preemption: PreemptionContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    notice = PreemptionNotice()
    preemption.preemption_info = info(100)
    assert [notice.request(), notice.request()] == [Request(save=True), NO_REQUEST]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 100 - ray_worker._BEFORE_S + 1)
    assert [notice.request(), notice.request()] == [Request(save=True), NO_REQUEST]


@pytest.mark.parametrize(("left_s", "again"), [(35, True), (25, False)])
def test_a_late_notice_causes_a_second_checkpoint_only_if_it_pays(
    preemption: PreemptionContext, monkeypatch: pytest.MonkeyPatch, left_s: float, again: bool
) -> None:
    notice = PreemptionNotice()
    preemption.preemption_info = info(left_s)
    assert notice.request() == Request(save=True)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + left_s - ray_worker._BEFORE_S + 1)
    assert notice.request() == Request(save=again)


def test_a_store_that_is_away_is_waited_for_before_training(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def open_late(*_: object) -> MemoryTracker:
        tries.append(1)
        if len(tries) < 3:
            raise StoreError("s3://bucket: no good answer")
        return MemoryTracker()

    monkeypatch.setattr(ray_worker, "open_tracker", open_late)
    monkeypatch.setattr(patience, "AGAIN_S", 0.0)
    job = WorkerJob(RunConfig(), "run", tmp_path, "", "", False, notes)
    assert isinstance(open_patiently(job, Ranks()), MemoryTracker)
    assert len(tries) == 3


def test_a_scratch_folder_that_cannot_be_made_is_fatal(
    notes: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETR_SCRATCH", str(tmp_path / "file"))
    with pytest.raises(RunConfigError, match="set DETR_SCRATCH to another") as raised:
        open_patiently(WorkerJob(RunConfig(), "run", tmp_path, "", "", False, notes), Ranks())
    report_failure(notes, 0, raised.value, None)
    fatal = notes.read_fatal_error()
    assert fatal is not None
    assert "set DETR_SCRATCH to another" in fatal.message


def test_the_last_points_are_sent_before_the_driver_hears_of_a_failure(notes: Notes) -> None:
    known: list[bool] = []

    class Tracker(MemoryTracker):
        def close(self, timeout_s: float = 60.0) -> None:
            known.append(notes.read_fatal_error() is not None)

    attempts.start_attempt(notes, 1)
    report_failure(notes, 0, CheckpointError("damaged"), Tracker())  # type: ignore[arg-type]
    assert known == [False]
    assert notes.read_fatal_error() is not None


@pytest.mark.parametrize(("wanted", "tag"), [(False, TAG_WARNING), (True, TAG_RESIZED)])
def test_the_first_step_reports_the_cost_of_the_restart(wanted: bool, tag: str) -> None:
    tracker = MemoryTracker()
    first = FirstStepReport(tracker, 2, Restart(1, EndReason("why", time.time() - 30, wanted), 3, 2))
    first(41)
    first(42)
    assert tracker.last_tags[tag].startswith("why; restart 1, 3 -> 2 workers, resumed after 30 s at step 41")
    assert [point[0] for point in tracker.points] == ["workers/number", "restart/seconds"]
    assert dict((name, value) for name, value, _ in tracker.points)["restart/seconds"] == pytest.approx(30, abs=1)


def test_the_first_attempt_reports_only_the_number_of_workers() -> None:
    tracker = MemoryTracker()
    FirstStepReport(tracker, 2, None)(1)
    FirstStepReport(None, 2, None)(1)
    assert tracker.points == [("workers/number", 2.0, 1)]
    assert not tracker.last_tags


def test_fewer_workers_take_no_more_images_at_a_time(tiny_config: RunConfig) -> None:
    fixed = replace(tiny_config, cluster=ClusterConfig(workers=3))
    elastic = replace(tiny_config, cluster=ClusterConfig(workers=3, min_workers=1))
    chosen = replace(elastic, compute=replace(elastic.compute, max_microbatch=1))
    assert with_microbatch_limit(fixed) == fixed
    assert with_microbatch_limit(elastic).compute.max_microbatch == 2  # of 4 images, 3 workers take 2, 1 and 1
    assert with_microbatch_limit(chosen) == chosen


def errors_after(notes: Notes, *errors: Exception, saves: bool = False) -> list[str | None]:
    """Return the fatal error after each attempt, of which each ends with one of the errors."""
    found = []
    for error in errors:
        attempts.start_attempt(notes, 2)
        if saves:
            attempts.record_progress(notes)
        record_failure(notes, 1, error)
        fatal = notes.read_fatal_error()
        found.append(fatal and fatal.message)
    return found


def test_the_same_error_twice_ends_the_run_unless_something_was_saved(notes: Notes) -> None:
    first, second = errors_after(notes, KeyError("lr"), KeyError("lr"))
    assert first is None
    assert second == (
        "worker 1 failed: 'lr'; the attempt before it ended with the same error and nothing was saved in between, so "
        "it is not tried again"
    )
    assert errors_after(memory_notes(), KeyError("lr"), KeyError("lr"), saves=True) == [None, None]
    assert errors_after(memory_notes(), KeyError("lr"), KeyError("bias"), KeyError("lr")) == [None, None, None]


@pytest.mark.parametrize(
    "error",
    [
        StoreError("s3://sets/coco: no good answer"),
        OSError(errno.ESTALE, "stale file handle"),
        ConnectionError("reset"),
        DistError(),
    ],
)
def test_errors_that_may_pass_are_tried_again(notes: Notes, error: Exception) -> None:
    assert errors_after(notes, error, error, error) == [None, None, None]


def test_an_error_of_the_user_ends_the_run_at_once(notes: Notes) -> None:
    assert errors_after(notes, CheckpointError("step-7 is of another run")) == ["step-7 is of another run"]
