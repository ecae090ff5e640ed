"""Runs whose MLflow does not answer: events that wait, and what is said of them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.driver import work
from pipeline.errors import (
    Postponed,
    TrackingError,
    TrainingError,
)
from pipeline.tracking import run_spools
from pipeline.tracking.events import Event
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import find_run
from pipeline.tracking.run_spools import TRAINING, open_tracker
from pipeline.tracking.tags import TAG_PHASE
from pipeline.train import Launch, resume, train
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from tests.support.workers import stand_in


class Away:
    """Sends to an MLflow that is away."""

    def __init__(self, *_: object) -> None:
        pass

    def __call__(self, events: list[Event]) -> None:
        raise ConnectionError("away")


def test_unsent_events_are_sent_by_the_next_resume(
    short_config: RunConfig, store: str, workers: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def trained(config: RunConfig, run_id: str, folder: Path, **_: Any) -> None:
        tracker = open_tracker(TRAINING, folder, run_id, store)
        run(config, RunInfo(run_id, folder, "commit"), Ranks(), tracker)
        tracker.close()

    stand_in(monkeypatch, trained)
    lines: list[str] = []
    with monkeypatch.context() as away:
        away.setattr(run_spools, "EventSender", Away)
        train(replace(short_config, storage=str(tmp_path / "runs")), Launch(say=lines.append))
    assert any("unsent-training.zip" in line and "the next command of the run" in line for line in lines)
    client = connect()
    found = find_run(client, "tiny")
    assert found.info.status == "FINISHED"
    assert "train/loss" not in found.data.metrics
    client.set_registered_model_alias("detr-tiny", "kept", "1")
    client.delete_registered_model_alias("detr-tiny", "best")
    resume("tiny", launch=Launch(say=lines.append))
    assert lines[-1] == "sending what MLflow had not taken when the run ended"
    found = find_run(client, "tiny")
    assert found.info.status == "FINISHED"
    assert {"train/loss", "val/AP"} <= set(found.data.metrics)
    assert found.data.tags[TAG_PHASE] == "finished", "the phases that were not sent have passed"
    assert set(client.get_registered_model("detr-tiny").aliases) == {"kept"}, "nothing is registered again"
    resume("tiny", launch=Launch(say=lines.append))
    assert lines.count("sending what MLflow had not taken when the run ended") == 1


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_unsent_events_of_a_trained_run_are_sent_before_registration(
    short_config: RunConfig, store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str
) -> None:
    def trained(config: RunConfig, run_id: str, folder: Path, **_: Any) -> None:
        tracker = open_tracker(TRAINING, folder, run_id, store)
        run(config, RunInfo(run_id, folder, "commit"), Ranks(), tracker)
        tracker.close()

    def ended(*_: object, **__: object) -> None:
        raise TrainingError("away") if status == "FAILED" else KeyboardInterrupt

    stand_in(monkeypatch, trained)
    launch = Launch(say=lambda text: None)
    with monkeypatch.context() as away:
        away.setattr(run_spools, "EventSender", Away)
        away.setattr("pipeline.registry.registration.register", ended)
        with pytest.raises(TrainingError):
            train(replace(short_config, storage=str(tmp_path / "runs")), launch)
    assert find_run(connect(), "tiny").info.status == status
    assert resume("tiny", launch=launch).version == "1"
    assert {"train/loss", "val/AP"} <= set(find_run(connect(), "tiny").data.metrics)


def test_a_loss_of_mlflow_is_one_line_that_says_what_is_kept(
    short_config: RunConfig, store: str, launch: Launch, workers: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise MlflowException("API request to http://host failed\nwith much more")

    workers(None)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.registry.registration.register", away)
        with pytest.raises(Postponed, match=r"failed.*everything is kept; `detr resume \w+` continues$") as caught:
            train(short_config, launch)
    assert "\n" not in str(caught.value)
    assert find_run(connect(), "tiny").info.status == "KILLED"
    assert resume("tiny", launch=launch).version == "1"
    with monkeypatch.context() as patch:
        patch.setattr(work, "create_run", away)
        with pytest.raises(TrackingError, match=r"MLflow at .* does not answer"):
            train(short_config, launch)
