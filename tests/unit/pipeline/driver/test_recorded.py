"""The end of a run in its record and in MLflow, by the error that ended it, and the exit statuses of `train`."""

import errno
from pathlib import Path
from typing import Any

import pytest

from pipeline import train
from pipeline.config import RunConfig
from pipeline.driver.launch import Launch
from pipeline.driver.lease import Claims, Lease
from pipeline.driver.record import new_record, read_record, write_record
from pipeline.driver.recorded import RecordedRun
from pipeline.errors import BusyError, Interrupted, Postponed, TrackingAway, TrainingError
from shards.store.retry import StoreError

PASSING = [StoreError("s3://b: no good answer"), TrackingAway("MLflow is away"), OSError(errno.ESTALE, "stale")]


class Statuses:
    """Client of MLflow that keeps the statuses it is given."""

    def __init__(self) -> None:
        self.ended: list[str] = []

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        """Take a tag."""

    def download_artifacts(self, run_id: str, path: str, folder: str) -> str:
        """Have no configuration."""
        raise FileNotFoundError(path)

    def set_terminated(self, run_id: str, status: str) -> None:
        """Keep the status."""
        self.ended.append(status)


def recorded(folder: Path, config: RunConfig, **fields: Any) -> tuple[RecordedRun, Statuses]:
    record = new_record(config.run_name, config, config, ("", "")).but(run_id="0123456789", status="running", **fields)
    write_record(folder, record)
    client: Any = Statuses()
    return RecordedRun(folder, Launch(say=print), Lease(Claims(folder), record.name), record, client), client


@pytest.mark.parametrize("error", PASSING)
def test_a_store_or_mlflow_that_is_away_postpones_a_run(
    error: Exception, tiny_config: RunConfig, tmp_path: Path
) -> None:
    run, client = recorded(tmp_path, tiny_config)
    with pytest.raises(Postponed, match="or the same command, continues"), run.recorded():
        raise error
    kept = read_record(tmp_path)
    assert kept is not None
    assert (client.ended, kept.status) == (["KILLED"], "running")


def test_a_run_that_fails_for_good_says_so_the_next_time(tiny_config: RunConfig, tmp_path: Path) -> None:
    run, client = recorded(tmp_path, tiny_config)
    with pytest.raises(TrainingError, match="too small"), run.recorded():
        raise TrainingError("too small")
    kept = read_record(tmp_path)
    assert kept is not None
    assert (client.ended, kept.status, kept.message) == (["FAILED"], "failed", "too small")


def test_a_lost_lease_leaves_the_run_to_the_driver_that_has_it(tiny_config: RunConfig, tmp_path: Path) -> None:
    run, client = recorded(tmp_path, tiny_config)
    run._lease.lost = "taken over by process 7 on elsewhere"
    with pytest.raises(BusyError, match="taken over by process 7 on elsewhere"), run.recorded():
        raise KeyboardInterrupt
    assert client.ended == []


def test_a_stop_after_the_end_leaves_the_run_finished(tiny_config: RunConfig, tmp_path: Path) -> None:
    run, client = recorded(tmp_path, tiny_config)
    run.record = run.record.but(status="finished")
    with pytest.raises(Interrupted, match="or the same command, continues"), run.recorded():
        raise KeyboardInterrupt
    assert client.ended == []


@pytest.mark.parametrize("error", PASSING)
def test_a_known_run_waits_for_its_store_and_a_new_one_fails(
    error: Exception, tiny_config: RunConfig, tmp_path: Path
) -> None:
    known = new_record("it", tiny_config, tiny_config, ("", ""))
    with pytest.raises(Postponed, match="continues when it answers"), train._postponing(lambda: known):
        raise error
    with pytest.raises(type(error)) as caught, train._postponing(lambda: None):
        raise error
    assert caught.value is error
    with pytest.raises(PermissionError), train._postponing(lambda: known):
        raise PermissionError(errno.EACCES, "denied")
