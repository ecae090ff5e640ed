"""Notes between the processes of a run."""

import logging
import time

import pytest

from pipeline.cluster.notes.notes import FatalError, Notes
from pipeline.cluster.notes.request_watch import RequestWatch
from tests.support.notes import MemoryNotes


@pytest.fixture
def store() -> MemoryNotes:
    return MemoryNotes()


def test_every_copy_sees_a_request(notes: Notes) -> None:
    copy = Notes(notes.store, notes.run_id, notes.driver)
    assert not copy.stop_requested()
    assert notes.request_stop()
    assert copy.stop_requested()


def test_the_first_of_several_fatal_errors_is_kept(notes: Notes) -> None:
    assert notes.read_fatal_error() is None
    notes.write_fatal_error("image 7 is damaged")
    notes.write_fatal_error("another rank's consequence")
    assert notes.read_fatal_error() == FatalError("image 7 is damaged")


def test_a_driver_sees_nothing_of_an_earlier_one_and_deletes_it(store: MemoryNotes) -> None:
    earlier, other = Notes.of_run("run", store), Notes.of_run("another run", store)
    earlier.request_stop()
    other.request_stop()
    later = Notes.of_run("run", store)
    assert not later.stop_requested()
    earlier.request_stop()  # one of its workers still runs
    assert not later.stop_requested()
    later.request_stop()
    later.clear()
    assert not later.stop_requested()
    assert earlier.stop_requested()
    assert other.stop_requested()


def test_a_cluster_that_does_not_answer_is_no_news_and_one_warning(
    store: MemoryNotes, caplog: pytest.LogCaptureFixture
) -> None:
    notes = Notes.of_run("run", store)
    notes.request_stop()
    store.away = True
    with caplog.at_level(logging.WARNING):
        assert not notes.stop_requested()
        assert notes.read_all("attempts/") is None
        assert not notes.request_stop()
        notes.write_fatal_error("lost")
        notes.delete("stop")
        notes.clear()
    assert [record.message for record in caplog.records] == [
        "the Ray cluster does not answer (the store does not answer); requests to stop wait until it does"
    ]
    store.away = False
    assert notes.stop_requested()
    store.away = True
    assert not notes.stop_requested()
    assert len(caplog.records) == 2


def test_the_training_thread_does_not_wait_for_the_notes(notes: Notes) -> None:
    def slow() -> bool:
        time.sleep(0.3)
        return notes.stop_requested()

    watch = RequestWatch(slow, look_s=0.01)
    notes.request_stop()
    before = time.monotonic()
    assert not watch.stop
    assert time.monotonic() - before < 0.2
    while not watch.stop:
        assert time.monotonic() - before < 20
        time.sleep(0.02)


def test_a_closed_watch_looks_no_more() -> None:
    looks: list[int] = []
    watch = RequestWatch(lambda: bool(looks.append(1)), look_s=0.01)
    watch.close()
    time.sleep(0.1)
    seen = len(looks)
    time.sleep(0.1)
    assert len(looks) == seen
