"""Records of the attempts at a run."""

import threading
import time
from pathlib import Path

import pytest

from pipeline.cluster import attempts
from pipeline.run_folder import clear_notes


def test_the_first_attempt_is_no_restart(tmp_path: Path) -> None:
    assert not attempts.has_started(tmp_path)
    assert attempts.start_attempt(tmp_path, 2) is None
    assert attempts.has_started(tmp_path)
    assert attempts.end_reason(tmp_path) is None


def test_an_attempt_is_at_work_until_its_end_is_recorded(tmp_path: Path) -> None:
    kinds: tuple[attempts.Kind, ...] = ("cause", "symptom")
    for kind in kinds:
        assert not attempts.is_running(tmp_path)
        attempts.start_attempt(tmp_path, 2)
        attempts.record_end(tmp_path, "worker 1 waits for images", "hang")
        assert attempts.is_running(tmp_path)
        attempts.record_end(tmp_path, "worker 1 died", kind)
    assert not attempts.is_running(tmp_path)


def test_a_restart_reports_reason_workers_and_time_lost(tmp_path: Path) -> None:
    attempts.start_attempt(tmp_path, 3)
    attempts.record_end(tmp_path, "worker 1 died: of cold")
    before = time.time()
    restart = attempts.start_attempt(tmp_path, 2)
    assert restart is not None
    line = restart.message(120, before + 31)
    assert line == "worker 1 died: of cold; restart 1, 3 -> 2 workers, resumed after 31 s at step 120"
    assert restart.seconds(before + 31) == pytest.approx(31, abs=1)
    again = attempts.start_attempt(tmp_path, 2)
    assert again is not None
    assert again.number == 2
    assert again.message(120, time.time()) == "a worker died; restart 2, resumed after 0 s at step 120"


def test_the_first_of_several_reasons_is_kept(tmp_path: Path) -> None:
    attempts.start_attempt(tmp_path, 8)
    threads = [threading.Thread(target=attempts.record_end, args=(tmp_path, f"worker {rank}")) for rank in range(8)]
    attempts.record_end(tmp_path, "the first")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reason = attempts.end_reason(tmp_path)
    assert reason is not None
    assert reason.why == "the first"
    assert len(list((tmp_path / "attempts").iterdir())) == 2


def test_a_cause_wins_over_a_symptom_with_the_earliest_time(tmp_path: Path) -> None:
    attempts.start_attempt(tmp_path, 2)
    attempts.record_end(tmp_path, "worker 0 failed: connection closed by peer", "symptom")
    symptom = attempts.end_reason(tmp_path)
    assert symptom is not None
    assert symptom.why == "worker 0 failed: connection closed by peer"
    time.sleep(0.05)
    attempts.record_end(tmp_path, "worker 1 died: killed")
    reason = attempts.end_reason(tmp_path)
    assert reason is not None
    assert (reason.why, reason.at) == ("worker 1 died: killed", symptom.at)


def test_a_hang_is_reported_unless_the_worker_continued(tmp_path: Path) -> None:
    attempts.start_attempt(tmp_path, 2)
    attempts.record_end(tmp_path, "worker 1 hangs", "hang")
    attempts.record_end(tmp_path, "timed out", "symptom")
    reason = attempts.end_reason(tmp_path)
    assert reason is not None
    assert reason.why == "worker 1 hangs"
    attempts.clear_hang(tmp_path, 0)
    reason = attempts.end_reason(tmp_path)
    assert reason is not None
    assert reason.why == "timed out"
    attempts.record_end(tmp_path, "worker 1 hangs", "hang")
    attempts.record_end(tmp_path, "worker 0 died: SIGABRT")
    reason = attempts.end_reason(tmp_path)
    assert reason is not None
    assert reason.why == "worker 1 hangs (worker 0 died: SIGABRT)"


def test_a_driver_deletes_the_records_of_the_previous_one(tmp_path: Path) -> None:
    attempts.start_attempt(tmp_path, 2)
    attempts.record_end(tmp_path, "worker 1 died")
    clear_notes(tmp_path)
    assert attempts.start_attempt(tmp_path, 2) is None
