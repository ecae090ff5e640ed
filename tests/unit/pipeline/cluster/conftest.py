"""Notes of a run without Ray, and a fit that is supervised."""

import signal
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from pipeline.cluster import supervisor
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.supervisor import GRACE_S, WorkerStatus, supervise
from tests.support.notes import memory_notes

Fit = Callable[..., None]


@pytest.fixture
def notes() -> Notes:
    """Notes of a new run, in this process."""
    return memory_notes()


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
