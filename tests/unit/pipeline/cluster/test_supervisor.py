"""Fits that end or fail, and which reason is reported."""

import threading
from collections.abc import Callable
from typing import ClassVar

import pytest

from pipeline.cluster.notes.attempts import record_end, start_attempt
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.worker import record_failure
from pipeline.errors import Postponed, TrainingError
from shards.store.retry import StoreError

Fit = Callable[..., None]


def test_a_fit_that_ends_is_the_end(fit: Fit) -> None:
    fit(lambda: None)


def test_a_failed_fit_is_reported_by_its_last_line(fit: Fit) -> None:
    def fail() -> None:
        raise RuntimeError("Ray's long report\nno more memory")

    with pytest.raises(TrainingError, match=r"^training failed: no more memory$"):
        fit(fail)


def test_a_fatal_error_ends_a_fit_that_would_restart(fit: Fit, notes: Notes) -> None:
    forever = threading.Event()

    def try_again() -> None:
        notes.write_fatal_error("image 7 is damaged")
        notes.write_fatal_error("another rank's consequence")
        forever.wait(60)

    with pytest.raises(TrainingError, match=r"^image 7 is damaged$") as caught:
        fit(try_again)
    assert not isinstance(caught.value, Postponed)
    forever.set()


def test_a_worker_can_leave_the_run_to_a_later_try(fit: Fit, notes: Notes) -> None:
    forever = threading.Event()

    def give_up() -> None:
        start_attempt(notes, 1)
        record_failure(notes, 0, Postponed("the store has not answered for 30 minutes"))
        forever.wait(60)

    with pytest.raises(Postponed, match=r"^the store has not answered for 30 minutes$"):
        fit(give_up)
    forever.set()


def test_a_failed_fit_is_reported_by_the_most_specific_reason(fit: Fit, notes: Notes) -> None:
    class GroupFailed(RuntimeError):
        worker_failures: ClassVar = {0: RuntimeError("connection closed")}

    def fail() -> None:
        start_attempt(notes, 2)
        record_end(notes, "worker 0 failed: connection closed", "symptom")
        record_end(notes, "worker 1 died: killed")
        raise GroupFailed("Ray's long report")

    with pytest.raises(TrainingError, match=r"^worker 1 died: killed$") as caught:
        fit(fail, saved=lambda: 7)
    assert not isinstance(caught.value, Postponed)


@pytest.mark.parametrize(("error", "kind"), [(StoreError("away"), Postponed), (ValueError("wrong"), TrainingError)])
def test_a_store_that_stays_away_leaves_the_run_to_a_later_try(
    fit: Fit, notes: Notes, error: Exception, kind: type[Exception]
) -> None:
    class GroupFailed(RuntimeError):
        worker_failures: ClassVar = {0: error}

    def fail() -> None:
        start_attempt(notes, 1)
        record_failure(notes, 0, error)
        raise GroupFailed("Ray's long report")

    with pytest.raises(TrainingError, match=f"^worker 0 failed: {error}") as caught:
        fit(fail)
    assert type(caught.value) is kind


@pytest.mark.parametrize("answers", [True, False])
def test_failures_after_progress_leave_the_run_to_a_later_try(fit: Fit, answers: bool) -> None:
    saved = [7]

    def step() -> int:
        if saved == [8] and not answers:
            raise StoreError("s3://bucket/runs: no good answer")
        return saved[0]

    def fail() -> None:
        saved[0] = 8
        raise RuntimeError("too many failures")

    kept = "the newest saved step is 8" if answers else r"the checkpoints cannot be listed now \(.*\)"
    with pytest.raises(Postponed, match=rf"^training failed: too many failures; {kept}$"):
        fit(fail, saved=step)
