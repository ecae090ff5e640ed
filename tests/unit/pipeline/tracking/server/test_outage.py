"""Outages of MLflow as lines, and work that waits until they are over."""

from datetime import datetime, timedelta

import pytest

from pipeline.errors import TrackingAway, TrackingError
from pipeline.tracking.server import outage
from pipeline.tracking.server.outage import KEPT, Outage, outlast


def test_an_outage_is_told_once_with_its_time_and_its_end() -> None:
    clock = [datetime(2026, 1, 1, 21, 31)]
    away = Outage(KEPT, now=lambda: clock[0])
    line = "MLflow does not answer since 21:31 (connection refused); training continues, nothing is lost"
    assert away.failed(ConnectionRefusedError(111, "Connection refused")) == line == away.text
    clock[0] += timedelta(minutes=4)
    assert away.failed(ConnectionRefusedError(111, "Connection refused")) == ""
    assert away.text == line
    assert away.answered() == "MLflow answers again after 4 min"
    assert (away.text, away.answered()) == ("", "")


def test_work_waits_for_mlflow_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_AGAIN_S", 0.001)
    tries = iter([TrackingAway("MLflow does not answer"), TrackingAway("still not"), None])
    said: list[str] = []

    def act() -> str:
        error = next(tries)
        if error:
            raise error
        return "done"

    assert outlast(act, "registering", 600, said.append) == "done"
    assert said[0].startswith("MLflow does not answer; registering waits for it, 10 min at most")
    assert said[1].startswith("MLflow answers again after")
    assert len(said) == 2


def test_patience_ends_and_other_errors_are_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_AGAIN_S", 0.001)
    said: list[str] = []
    tries: list[int] = []

    def away() -> None:
        tries.append(1)
        raise TrackingAway("away")

    def refused() -> None:
        raise TrackingError("refused")

    with pytest.raises(TrackingAway, match="away"):
        outlast(away, "registering", 0.01, said.append)
    assert len(tries) > 1
    with pytest.raises(TrackingAway):
        outlast(away, "registering", 0, said.append)
    with pytest.raises(TrackingError, match="refused"):
        outlast(refused, "registering", 600, said.append)
    assert len(said) == 1
