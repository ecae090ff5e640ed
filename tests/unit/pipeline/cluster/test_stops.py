"""Stops of a fit, with real signals to this process."""

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from pipeline.cluster import supervisor
from pipeline.cluster.notes.attempts import record_end, start_attempt
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.supervisor import GRACE_S
from pipeline.errors import Interrupted, Killed
from shards.store.retry import StoreError

Fit = Callable[..., None]


def signal_this_process(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


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
