"""`detr sync`: what a driver that has gone left is sent, and the run gets the status that its record has."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.driver import sync as module
from pipeline.driver.lease import Claims, Lease
from pipeline.driver.record import new_record, read_record, write_record
from pipeline.driver.sync import sync
from pipeline.errors import BusyError, Postponed
from pipeline.tracking.run_spools import Sent


class Mlflow:
    """A client of one run that MLflow calls running."""

    def __init__(self) -> None:
        self.status, self.phase = "RUNNING", "training"

    def get_run(self, _: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(status=self.status))

    def set_tag(self, _: str, __: str, value: str) -> None:
        self.phase = value

    def download_artifacts(self, *_: str) -> str:
        raise OSError("a run without a configuration")

    def set_terminated(self, _: str, status: str) -> None:
        self.status = status


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> Mlflow:
    client = Mlflow()
    monkeypatch.setattr(module, "connect", lambda: client)
    return client


def left(monkeypatch: pytest.MonkeyPatch, folder: Path, config: RunConfig, sent: Sent, **fields: Any) -> None:
    """Leave a record at `folder`, beside a spool of which MLflow will take so much."""
    record = new_record("it", config, config, ("", "")).but(run_id="0123456789", **fields)
    write_record(folder, record)
    monkeypatch.setattr(module, "find", lambda _: (folder, record))
    monkeypatch.setattr(module, "count_left", lambda *_: sent)


@pytest.mark.parametrize(
    ("status", "ended", "phase", "told"),
    [
        ("finished", "FINISHED", "finished", "it is finished"),
        ("failed", "FAILED", "failed", "it is failed"),
        ("running", "KILLED", "killed", "`detr resume 01234567` continues it"),
    ],
)
def test_a_run_gets_its_points_and_its_status(
    status: str,
    ended: str,
    phase: str,
    told: str,
    mlflow: Mlflow,
    tiny_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left(monkeypatch, tmp_path, tiny_config, Sent(True, 12), status=status, unsent=True)
    lines: list[str] = []
    sync("it", lines.append)
    assert (mlflow.status, mlflow.phase) == (ended, phase)
    assert lines[-1].startswith("sent 12 events of run 01234567; ")
    assert told in lines[-1]
    record = read_record(tmp_path)
    assert record is not None
    assert not record.unsent


def test_what_mlflow_does_not_take_is_left_to_the_next_time(
    mlflow: Mlflow, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(monkeypatch, tmp_path, tiny_config, Sent(False, 3), status="finished", unsent=True)
    with pytest.raises(Postponed, match="the same command sends the rest"):
        sync("it", print)
    record = read_record(tmp_path)
    assert record is not None
    assert record.unsent


def test_a_run_that_a_driver_works_on_is_left_to_it(
    mlflow: Mlflow, tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left(monkeypatch, tmp_path, tiny_config, Sent(True, 12), status="running")
    lease = Lease(Claims(tmp_path), "it")
    lease.acquire()
    with lease.kept(lambda: None), pytest.raises(BusyError):
        sync("it", print)
    assert mlflow.status == "RUNNING"
