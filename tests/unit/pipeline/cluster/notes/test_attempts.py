"""Records of the attempts at a run."""

import threading
import time

import pytest

from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.notes import Notes


def test_the_first_attempt_is_no_restart(notes: Notes) -> None:
    assert not attempts.has_started(notes)
    assert attempts.start_attempt(notes, 2) is None
    assert attempts.has_started(notes)
    assert attempts.end_reason(notes) is None


def test_an_attempt_is_at_work_until_its_end_is_recorded(notes: Notes) -> None:
    kinds: tuple[attempts.Kind, ...] = ("cause", "symptom")
    for kind in kinds:
        assert not attempts.is_running(notes)
        attempts.start_attempt(notes, 2)
        attempts.record_end(notes, "worker 1 waits for images", "hang")
        assert attempts.is_running(notes)
        attempts.record_end(notes, "worker 1 died", kind)
    assert not attempts.is_running(notes)


def test_a_restart_reports_reason_workers_and_time_lost(notes: Notes) -> None:
    attempts.start_attempt(notes, 3)
    attempts.record_end(notes, "worker 1 died: of cold")
    before = time.time()
    restart = attempts.start_attempt(notes, 2)
    assert restart is not None
    line = restart.message(120, before + 31)
    assert line == "worker 1 died: of cold; restart 1, 3 -> 2 workers, resumed after 31 s at step 120"
    assert restart.seconds(before + 31) == pytest.approx(31, abs=1)
    again = attempts.start_attempt(notes, 2)
    assert again is not None
    assert again.number == 2
    assert again.message(120, time.time()) == "a worker died; restart 2, resumed after 0 s at step 120"


def test_the_first_of_several_reasons_is_kept(notes: Notes) -> None:
    attempts.start_attempt(notes, 8)
    threads = [threading.Thread(target=attempts.record_end, args=(notes, f"worker {rank}")) for rank in range(8)]
    attempts.record_end(notes, "the first")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reason = attempts.end_reason(notes)
    assert reason is not None
    assert reason.why == "the first"
    assert len(notes.read_all("attempts/") or {}) == 2


def test_a_cause_wins_over_a_symptom_with_the_earliest_time(notes: Notes) -> None:
    attempts.start_attempt(notes, 2)
    attempts.record_end(notes, "worker 0 failed: connection closed by peer", "symptom")
    symptom = attempts.end_reason(notes)
    assert symptom is not None
    assert symptom.why == "worker 0 failed: connection closed by peer"
    time.sleep(0.05)
    attempts.record_end(notes, "worker 1 died: killed")
    reason = attempts.end_reason(notes)
    assert reason is not None
    assert (reason.why, reason.at) == ("worker 1 died: killed", symptom.at)


def test_a_hang_is_reported_unless_the_worker_continued(notes: Notes) -> None:
    attempts.start_attempt(notes, 2)
    attempts.record_end(notes, "worker 1 hangs", "hang")
    attempts.record_end(notes, "timed out", "symptom")
    reason = attempts.end_reason(notes)
    assert reason is not None
    assert reason.why == "worker 1 hangs"
    attempts.clear_hang(notes, 0)
    reason = attempts.end_reason(notes)
    assert reason is not None
    assert reason.why == "timed out"
    attempts.record_end(notes, "worker 1 hangs", "hang")
    attempts.record_end(notes, "worker 0 died: SIGABRT")
    reason = attempts.end_reason(notes)
    assert reason is not None
    assert reason.why == "worker 1 hangs (worker 0 died: SIGABRT)"


def test_the_same_error_repeats_itself_until_something_is_saved(notes: Notes) -> None:
    for error, saved, repeated in [
        ("no such key", True, False),
        ("no such key", True, False),
        ("no such key", False, True),
        ("another key", False, False),
        ("", False, False),  # no exception of a worker
        ("another key", False, False),
        ("another key", False, True),
    ]:
        attempts.start_attempt(notes, 2)
        if saved:
            attempts.record_progress(notes)
        assert attempts.repeats(notes, error) == repeated
        attempts.record_end(notes, f"worker 1 failed: {error}", error=error)


def test_workers_hand_over_once(notes: Notes) -> None:
    attempts.start_attempt(notes, 2)
    attempts.finish_handover(notes)
    assert not attempts.handover_finished(notes), "nobody asked"
    attempts.request_handover(notes)
    attempts.record_end(notes, "there are resources for 3 workers", wanted=True)
    assert attempts.asked_to_return(notes)
    assert attempts.is_running(notes), "they have to save yet"
    attempts.finish_handover(notes)
    assert attempts.handover_finished(notes)
    assert not attempts.is_running(notes)
    attempts.start_attempt(notes, 3)
    assert not attempts.asked_to_return(notes), "the next group would stop at once"
