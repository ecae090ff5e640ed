"""Claims on the cluster's resources that dead drivers have left."""

from pipeline.cluster.notes.claims import cancel_dead_claims, record_claim
from tests.support.notes import MemoryNotes


def test_claims_of_dead_jobs_are_cancelled_once() -> None:
    store = MemoryNotes()
    for requester, job in (("train-a", "01000000"), ("train-b", "02000000"), ("train-c", "03000000")):
        record_claim(store, requester, job)
    cancelled: list[str] = []
    assert cancel_dead_claims(store, lambda: {"02000000", "04000000"}, cancelled.append) == 2
    assert cancelled == ["train-a", "train-c"]
    assert cancel_dead_claims(store, lambda: {"02000000"}, cancelled.append) == 0
    assert cancel_dead_claims(store, lambda: set(), cancelled.append) == 1


def test_a_cluster_that_does_not_answer_is_left_alone() -> None:
    store = MemoryNotes()
    record_claim(store, "train-a", "01000000")

    def away(_: str) -> None:
        raise ConnectionError("busy")

    assert cancel_dead_claims(store, lambda: set(), away) == 0
    assert len(store) == 1, "the next driver tries again"
    store.away = True
    record_claim(store, "train-b", "02000000")
    assert cancel_dead_claims(store, lambda: set(), lambda _: None) == 0
