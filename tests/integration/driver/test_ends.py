"""Ends of runs: what MLflow and the store know of them afterwards, and one driver at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.driver.changes import ResumeOptions
from pipeline.driver.dead_drivers import close_dead_runs
from pipeline.driver.lease import Claims, Lease
from pipeline.errors import (
    BusyError,
    Interrupted,
    Postponed,
    TrainingError,
)
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import find_run
from pipeline.tracking.tags import TAG_FOLDER, TAG_PHASE
from pipeline.train import Launch, resume, train
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from tests.support.workers import runs_in_mlflow, stand_in


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (KeyboardInterrupt(), "KILLED", "detr resume"),
        (SystemExit(0), "KILLED", "detr resume"),  # what Ray makes of an interrupt
        (Interrupted("interrupted"), "KILLED", "detr resume"),
        (TrainingError("step 3: not finite"), "FAILED", "step 3: not finite"),
    ],
)
def test_mlflow_says_how_a_run_ended(
    short_config: RunConfig,
    store: str,
    launch: Launch,
    workers: Callable[..., None],
    error: BaseException,
    status: str,
    reason: str,
) -> None:
    workers(error)
    with pytest.raises(TrainingError, match=reason):
        train(short_config, launch)
    assert find_run(connect(), "tiny").info.status == status


def test_a_run_that_is_done_is_not_trained_again(
    short_config: RunConfig, store: str, launch: Launch, workers: Callable[..., None]
) -> None:
    workers(None)
    outcome = train(short_config, launch)
    assert (outcome.version, outcome.is_best) == ("1", True)
    workers(AssertionError("the workers were started"))
    assert resume("tiny", launch=launch) == outcome
    workers(None)
    assert resume("tiny", ResumeOptions(epochs=2), launch).version == "2"


def test_a_run_has_one_driver(
    short_config: RunConfig, store: str, launch: Launch, workers: Callable[..., None]
) -> None:
    workers(TrainingError("stopped on the way"))
    with pytest.raises(TrainingError, match="on the way"):
        train(short_config, launch)
    folder = find_run(connect(), "tiny").data.tags[TAG_FOLDER]
    lease = Lease(Claims(Path(folder)), "tiny")
    lease.acquire()
    with pytest.raises(BusyError, match="process"):
        resume("tiny", launch=launch)
    lease.release()


def test_workers_that_end_early_do_not_finish_a_run(
    tiny_config: RunConfig, store: str, launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half(config: RunConfig, run_id: str, folder: Path, **_: Any) -> None:
        run(replace(config, optim=replace(config.optim, max_steps=2)), RunInfo(run_id, folder, "commit"), Ranks(), None)

    stand_in(monkeypatch, half)
    config = replace(tiny_config, storage=str(tmp_path / "runs"))
    with pytest.raises(Postponed, match="the workers ended at step 2 of 6 without a reason"):
        train(config, launch, run="it")
    with pytest.raises(TrainingError, match="ended at step 2 of 6") as caught:
        train(config, launch, run="it")
    assert not isinstance(caught.value, Postponed), "the second time there was no progress"
    assert runs_in_mlflow() == ["FAILED"]


def test_a_killed_driver_s_run_is_called_killed_by_whoever_looks(
    named: RunConfig, store: str, launch: Launch, workers: Callable[..., None]
) -> None:
    workers(Interrupted("stopped at a checkpoint"))
    with pytest.raises(Interrupted):
        train(named, launch, run="it")
    client = connect()
    run_id = find_run(client, "it").info.run_id
    lease = Lease(Claims(Path(named.storage) / "it"), "it")
    lease.acquire()
    client.update_run(run_id, status="RUNNING")
    client.set_tag(run_id, TAG_PHASE, "training")
    assert not close_dead_runs(client, [client.get_run(run_id)], print), "its driver is this process"
    lease.release()
    assert close_dead_runs(client, [client.get_run(run_id)], print)
    found = client.get_run(run_id)
    assert (found.info.status, found.data.tags[TAG_PHASE]) == ("KILLED", "killed")
