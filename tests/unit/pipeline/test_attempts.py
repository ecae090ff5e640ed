"""What attempts at a run leave for those after them."""

import threading
import time
from pathlib import Path

import pytest

from pipeline import attempts


def test_the_first_attempt_is_no_restart(tmp_path: Path) -> None:
    assert not attempts.begun(tmp_path)
    assert attempts.begin(tmp_path, 2) is None
    assert attempts.begun(tmp_path)
    assert attempts.last_word(tmp_path) is None


def test_an_attempt_is_at_work_until_somebody_knows_of_its_end(tmp_path: Path) -> None:
    kinds: tuple[attempts.Kind, ...] = ("cause", "consequence")
    for kind in kinds:
        assert not attempts.at_work(tmp_path)
        attempts.begin(tmp_path, 2)
        attempts.end(tmp_path, "worker 1 waits for images", "hang")
        assert attempts.at_work(tmp_path)
        attempts.end(tmp_path, "worker 1 died", kind)
    assert not attempts.at_work(tmp_path)


def test_a_restart_says_why_with_how_many_and_how_long_it_took(tmp_path: Path) -> None:
    attempts.begin(tmp_path, 3)
    attempts.end(tmp_path, "worker 1 died: of cold")
    before = time.time()
    restart = attempts.begin(tmp_path, 2)
    assert restart is not None
    told = restart.told(120, before + 31)
    assert told == "worker 1 died: of cold; restart 1, 3 -> 2 workers, goes on after 31 s at step 120"
    assert restart.seconds(before + 31) == pytest.approx(31, abs=1)
    again = attempts.begin(tmp_path, 2)
    assert again is not None
    assert again.number == 2
    assert again.told(120, time.time()) == "a worker died; restart 2, goes on after 0 s at step 120"


def test_of_several_words_the_first_stands(tmp_path: Path) -> None:
    attempts.begin(tmp_path, 8)
    threads = [threading.Thread(target=attempts.end, args=(tmp_path, f"worker {rank}")) for rank in range(8)]
    attempts.end(tmp_path, "the first")
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    word = attempts.last_word(tmp_path)
    assert word is not None
    assert word.why == "the first"
    assert len(list((tmp_path / "attempts").iterdir())) == 2


def test_a_cause_says_more_than_what_others_met_and_the_earliest_time_counts(tmp_path: Path) -> None:
    attempts.begin(tmp_path, 2)
    attempts.end(tmp_path, "worker 0 failed: connection closed by peer", "consequence")
    met = attempts.last_word(tmp_path)
    assert met is not None
    assert met.why == "worker 0 failed: connection closed by peer"
    time.sleep(0.05)
    attempts.end(tmp_path, "worker 1 died: killed")
    word = attempts.last_word(tmp_path)
    assert word is not None
    assert (word.why, word.at) == ("worker 1 died: killed", met.at)


def test_what_hung_is_said_unless_it_went_on(tmp_path: Path) -> None:
    attempts.begin(tmp_path, 2)
    attempts.end(tmp_path, "worker 1 hangs", "hang")
    attempts.end(tmp_path, "timed out", "consequence")
    word = attempts.last_word(tmp_path)
    assert word is not None
    assert word.why == "worker 1 hangs"
    attempts.goes_on(tmp_path, 0)
    word = attempts.last_word(tmp_path)
    assert word is not None
    assert word.why == "timed out"
    attempts.end(tmp_path, "worker 1 hangs", "hang")
    attempts.end(tmp_path, "worker 0 died: SIGABRT")
    word = attempts.last_word(tmp_path)
    assert word is not None
    assert word.why == "worker 1 hangs (worker 0 died: SIGABRT)"


def test_a_driver_forgets_the_attempts_of_the_one_before(tmp_path: Path) -> None:
    attempts.begin(tmp_path, 2)
    attempts.end(tmp_path, "worker 1 died")
    attempts.forget(tmp_path)
    assert attempts.begin(tmp_path, 2) is None
