"""Ends of a fit, with real signals to this process."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest

from pipeline.cluster import supervisor
from pipeline.cluster.notes.attempts import record_end, start_attempt
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.supervisor import GRACE_S, WorkerStatus, supervise
from pipeline.cluster.worker import record_failure
from pipeline.errors import Interrupted, Killed, Postponed, TrainingError
from shards.store.retry import StoreError

Fit = Callable[..., None]


@pytest.fixture
def late_signals() -> Iterator[None]:
    """Handlers around a test, so that a signal which comes after a fit has ended does not end the tests."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fit(notes: Notes, monkeypatch: pytest.MonkeyPatch, late_signals: None) -> Fit:
    monkeypatch.setattr(supervisor, "_following", lambda _: nullcontext())
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def run(
        work: Callable[[], None], say: Callable[[str], None] = lambda _: None, grace_s: float = GRACE_S, **known: Any
    ) -> None:
        try:
            supervise(work, "run", notes, say, WorkerStatus(**known), grace_s)
        finally:
            assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

    return run


def signal_this_process(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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


def test_a_signal_to_the_process_and_to_its_group_is_one_request(fit: Fit, notes: Notes) -> None:
    def work() -> None:
        start_attempt(notes, 1)
        signal_this_process(signal.SIGTERM)
        time.sleep(0.1)
        signal_this_process(signal.SIGTERM)
        until(notes.stop_requested)
        time.sleep(0.5)

    with pytest.raises(Interrupted) as caught:
        fit(work)
    assert not isinstance(caught.value, Killed)


def test_signals_that_follow_each_other_soon_end_the_workers(
    fit: Fit, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_TOGETHER_S", 0.3)
    forever, ended, messages = threading.Event(), threading.Event(), list[str]()

    def hang() -> None:
        start_attempt(notes, 1)
        while not forever.wait(0.1):
            signal_this_process(signal.SIGINT)
        ended.set()

    with pytest.raises(Killed, match="no step is saved"):
        fit(hang, messages.append, 5.0)
    forever.set()
    assert ended.wait(60)
    assert "did not answer" not in messages[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_workers_and_waits_for_them(fit: Fit, notes: Notes, number: signal.Signals) -> None:
    saved = []

    def work() -> None:
        start_attempt(notes, 1)
        signal_this_process(number)
        until(lambda: notes.stop_requested())
        time.sleep(0.5)
        saved.append(True)

    with pytest.raises(Interrupted, match="at a checkpoint"):
        fit(work)
    assert saved


@pytest.mark.parametrize("reason", ["a second signal", "no answer in time"])
def test_workers_that_do_not_answer_are_not_waited_for(
    fit: Fit, notes: Notes, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(supervisor, "_TOGETHER_S", 0.0)
    forever, ended, messages = threading.Event(), threading.Event(), list[str]()
    grace_s = 0.3 if reason == "no answer in time" else GRACE_S

    def hang() -> None:
        start_attempt(notes, 1)
        signal_this_process(signal.SIGTERM)
        until(lambda: notes.stop_requested())
        if reason == "a second signal":
            signal_this_process(signal.SIGTERM)
        forever.wait(60)
        ended.set()

    with pytest.raises(Killed, match=r"^the newest saved step is 7$"):
        fit(hang, messages.append, grace_s, saved=lambda: 7)
    assert not ended.is_set()
    assert messages[1:] == (["the workers did not answer within 0.3 s"] if reason == "no answer in time" else [])
    forever.set()


def test_a_store_without_answer_does_not_make_a_stop_a_failure(fit: Fit, notes: Notes) -> None:
    forever, messages = threading.Event(), list[str]()

    def hang() -> None:
        start_attempt(notes, 1)
        signal_this_process(signal.SIGTERM)
        forever.wait(60)

    def away() -> int:
        raise StoreError("s3://bucket/runs: no good answer")

    with pytest.raises(Killed, match=r"^the checkpoints cannot be listed now \(s3://bucket/runs: no good answer\)$"):
        fit(hang, messages.append, 0.3, saved=away)
    forever.set()


def test_workers_that_cannot_save_do_not_make_a_stop_a_failure(fit: Fit, notes: Notes) -> None:
    forever, messages = threading.Event(), list[str]()

    def fail() -> None:
        start_attempt(notes, 1)
        signal_this_process(signal.SIGTERM)
        until(lambda: notes.stop_requested())
        notes.write_fatal_error("checkpoint s3://bucket/runs could not be written")
        forever.wait(60)

    with pytest.raises(Killed, match="could not save"):
        fit(fail, messages.append)
    assert (
        messages[-1] == "the workers failed while they were stopping: checkpoint s3://bucket/runs could not be written"
    )
    forever.set()


def test_a_signal_before_training_ends_the_run_at_once(fit: Fit, notes: Notes) -> None:
    forever = threading.Event()

    def start_slowly() -> None:
        signal_this_process(signal.SIGINT)
        forever.wait(60)

    with pytest.raises(Interrupted, match="no worker ran"):
        fit(start_slowly)
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


def test_workers_that_start_again_are_not_waited_for(fit: Fit, notes: Notes) -> None:
    forever = threading.Event()

    def restart() -> None:
        start_attempt(notes, 2)
        record_end(notes, "worker 1 died")
        signal_this_process(signal.SIGTERM)
        forever.wait(60)

    with pytest.raises(Interrupted, match="no worker ran"):
        fit(restart)
    forever.set()


def test_a_stop_waits_for_a_cluster_that_does_not_answer(fit: Fit, notes: Notes) -> None:
    saved = []

    def work() -> None:
        start_attempt(notes, 1)
        notes.store.away = True  # type: ignore[attr-defined]
        signal_this_process(signal.SIGTERM)
        time.sleep(0.5)
        notes.store.away = False  # type: ignore[attr-defined]
        until(notes.stop_requested)
        saved.append(True)

    with pytest.raises(Interrupted, match="at a checkpoint"):
        fit(work)
    assert saved


def test_an_outage_after_the_request_does_not_make_the_workers_idle(
    fit: Fit, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved, request = list[bool](), type(notes).request_stop

    def request_and_lose(self: Notes) -> bool:
        asked = request(self)
        notes.store.away = asked and not saved  # type: ignore[attr-defined]
        return asked

    def work() -> None:
        start_attempt(notes, 1)
        monkeypatch.setattr(Notes, "request_stop", request_and_lose)
        signal_this_process(signal.SIGTERM)
        time.sleep(0.6)
        saved.append(True)
        notes.store.away = False  # type: ignore[attr-defined]
        until(notes.stop_requested)

    with pytest.raises(Interrupted, match="at a checkpoint"):
        fit(work)
    assert saved


@pytest.mark.parametrize("ray", ["fails", "hangs"])
def test_workers_that_end_after_a_signal_are_part_of_the_stop(fit: Fit, notes: Notes, ray: str) -> None:
    """A scheduler may signal every process of a job: Ray and its workers end with the driver's signal."""
    forever, gone, ended, messages = threading.Event(), threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        start_attempt(notes, 1)
        signal_this_process(signal.SIGTERM)
        if ray == "fails":
            raise RuntimeError("RpcError Socket closed")
        gone.set()
        forever.wait(60)
        ended.set()

    with pytest.raises(Killed, match=r"^no step is saved yet$"):
        fit(work, messages.append, gone=gone.is_set)
    assert not ended.is_set()
    assert ray == "fails" or messages[-1] == "the workers ended before they could save"
    forever.set()
