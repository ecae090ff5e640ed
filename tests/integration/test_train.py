"""The driver around the workers, without Ray: a real store and folder, and workers in this process."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import s3fs
from mlflow.exceptions import MlflowException

from pipeline.checkpoint import catalog
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.driver import work
from pipeline.driver.changes import ResumeOptions
from pipeline.driver.dead_drivers import close_dead_runs
from pipeline.driver.lease import Claims, Lease
from pipeline.errors import (
    BusyError,
    CheckpointError,
    Interrupted,
    Postponed,
    RunConfigError,
    TrackingError,
    TrainingError,
)
from pipeline.tracking import run_spools
from pipeline.tracking.events import Event
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import find_run
from pipeline.tracking.run_spools import TRAINING, open_tracker
from pipeline.tracking.tags import TAG_FOLDER, TAG_PHASE, TAG_STREAM, TAG_TOTAL_STEPS
from pipeline.train import Launch, resume, train
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from tests.support.s3_server import S3Server
from tests.support.workers import stand_in


@pytest.fixture
def launch() -> Launch:
    return Launch(say=lambda text: None)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], None]:
    """Choose how the workers end: trained in this process, or with an error."""

    def choose(error: BaseException | None) -> None:
        def run_workers(config: RunConfig, run_id: str, folder: Path, *, accept_change: bool = False) -> None:
            if error is not None:
                raise error
            run(config, RunInfo(run_id, folder, "commit", accept_change), Ranks(), None)

        stand_in(monkeypatch, run_workers)

    return choose


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


def test_another_batch_size_must_be_accepted_and_is_then_recorded(
    tiny_config: RunConfig, store: str, workers: Callable[..., None], tmp_path: Path
) -> None:
    config = replace(tiny_config, storage=str(tmp_path / "runs"), optim=replace(tiny_config.optim, max_steps=2))
    workers(None)
    train(config, Launch(say=lambda text: None))
    lines: list[str] = []
    launch = Launch(say=lines.append)
    with pytest.raises(CheckpointError, match=r"optim.batch_size 4, now it is 5; .* `detr resume --accept-change`"):
        resume("tiny", ResumeOptions(epochs=2, batch_size=5), launch)
    assert lines == []
    resume("tiny", ResumeOptions(epochs=2, batch_size=5, accept=True), launch)
    change = "from step 2 (8 samples) on: optim.batch_size 4 -> 5"
    warning = (
        f"warning: another stream of samples {change}; it is entered at epoch 0.67 and shows the rest of that epoch"
    )
    assert warning in lines
    tags = find_run(connect(), "tiny").data.tags
    assert tags[TAG_STREAM] == change
    assert tags[TAG_TOTAL_STEPS] == "6"  # 16 samples are left: four steps, the last of them filled up
    (folder,) = (tmp_path / "runs").iterdir()
    newest = catalog.newest(folder)
    assert newest == catalog.folder_of(folder, 6)
    resume("tiny", ResumeOptions(epochs=3), launch)  # and is the run's own from then on
    assert read_meta(catalog.folder_of(folder, 8)).samples == 38


def test_a_run_does_not_start_anew_if_its_store_is_gone(
    short_config: RunConfig, store: str, launch: Launch, workers: Callable[..., None], tmp_path: Path
) -> None:
    kept, away = tmp_path / "kept", tmp_path / "away"
    workers(None)
    train(replace(short_config, checkpoint=replace(short_config.checkpoint, store=str(kept))), launch)
    kept.rename(away)
    workers(AssertionError("the workers were started"))
    with pytest.raises(CheckpointError, match=rf"^{kept}/tiny-\w+ .* has saved step \d+ there: is its storage mounted"):
        resume("tiny", ResumeOptions(epochs=2), launch)
    away.rename(kept)
    workers(None)
    assert resume("tiny", ResumeOptions(epochs=2), launch).version == "2"


def test_the_store_is_checked_before_data_and_model_are_prepared(
    short_config: RunConfig, store: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.driver.preflight.prepare", lambda *_: pytest.fail("made ready"))
    config = replace(short_config, checkpoint=replace(short_config.checkpoint, store="foo://bar"))
    with pytest.raises(RunConfigError, match=r"^checkpoint\.store foo://bar: "):
        train(config, launch)


def test_storage_that_cannot_be_written_is_found_before_a_run_exists(
    short_config: RunConfig, store: str, launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunConfigError, match="storage"):
        train(replace(short_config, storage=str(tmp_path / "file" / "runs")), launch)
    assert not connect().search_experiments(filter_string="name = 'detr'")


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


@pytest.fixture
def named(short_config: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(short_config, storage=str(tmp_path / "runs"))


def runs_in_mlflow() -> list[str]:
    """Return the status of every run, whatever its tags."""
    client = connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments)]


def test_the_same_command_is_the_same_run(
    named: RunConfig, store: str, launch: Launch, workers: Callable[..., None]
) -> None:
    workers(Interrupted("stopped at a checkpoint"))
    with pytest.raises(Interrupted, match="`detr resume it`, or the same command, continues"):
        train(named, launch, run="it")
    workers(None)
    outcome = train(named, launch, run="it")
    workers(AssertionError("the workers were started"))
    lines: list[str] = []
    assert train(named, Launch(say=lines.append), run="it") == outcome
    assert resume("it", launch=launch) == resume(str(outcome.folder), launch=launch) == outcome
    assert lines == [
        "run it is finished and registered as models:/detr-tiny/1; `detr resume it --epochs N` trains it further"
    ]
    assert runs_in_mlflow() == ["FINISHED"]
    assert [path.name for path in Path(named.storage).iterdir()] == ["it"]


def test_another_command_of_a_name_is_refused_or_accepted(
    named: RunConfig, store: str, launch: Launch, workers: Callable[..., None]
) -> None:
    workers(None)
    train(named, launch, run="it")
    with pytest.raises(RunConfigError, match=r"optim\.lr 0\.001 -> 0\.5"):
        train(replace(named, optim=replace(named.optim, lr=0.5)), launch, run="it")
    longer = replace(named, optim=replace(named.optim, max_steps=2))
    with pytest.raises(RunConfigError, match=r"optim\.max_steps 1 -> 2; expected the same, or --accept-change"):
        train(longer, launch, run="it")
    assert train(longer, launch, run="it", accept_change=True).version == "2"
    assert train(longer, launch, run="it").version == "2"


def test_a_run_that_failed_for_good_fails_again_until_an_option_changes(
    named: RunConfig, store: str, launch: Launch, workers: Callable[..., None]
) -> None:
    workers(TrainingError("worker 0 ran out of memory"))
    with pytest.raises(TrainingError, match=r"^worker 0 ran out of memory$"):
        train(named, launch, run="it")
    workers(AssertionError("the workers were started"))
    with pytest.raises(TrainingError, match=r"^worker 0 ran out of memory .*`detr resume it` tries again") as caught:
        train(named, launch, run="it")
    assert getattr(caught.value, "exit_status", 1) == 1
    workers(None)
    lines: list[str] = []
    smaller = replace(named, compute=replace(named.compute, max_microbatch=1))
    assert train(smaller, Launch(say=lines.append), run="it").version == "1"
    assert "run it continues with compute.max_microbatch 0 -> 1" in lines


@pytest.mark.parametrize("moment", ["create_run", "set_tag", "write_initial_weights"])
def test_a_kill_while_a_run_is_created_leaves_one_run(
    named: RunConfig,
    store: str,
    launch: Launch,
    workers: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    class Kill(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(work.Work, "_end", lambda *_: None)  # a killed driver records nothing
        if moment == "create_run":  # in MLflow, but not in the record
            real = work.create_run
            patch.setattr(work, "create_run", lambda *arguments: kill(real(*arguments)))
        elif moment == "set_tag":
            patch.setattr("mlflow.MlflowClient.log_text", kill)
        else:
            patch.setattr(work.PreparedRun, "write_initial_weights", kill)
        with pytest.raises(Kill):
            train(named, launch, run="it")
    workers(None)
    assert train(named, launch, run="it").version == "1"
    assert runs_in_mlflow() == ["FINISHED"]


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


def test_data_may_lie_elsewhere_but_not_be_other_data(
    named: RunConfig, store: str, launch: Launch, workers: Callable[..., None], tmp_path: Path
) -> None:
    workers(Interrupted("stopped at a checkpoint"))
    with pytest.raises(Interrupted):
        train(named, launch, run="it")
    moved = shutil.copytree(named.data.train, tmp_path / "moved")
    workers(None)
    other = replace(named, data=replace(named.data, train=named.data.val))
    with pytest.raises(RunConfigError, match="is not the data that run it was started with"):
        train(other, launch, run="it")
    assert train(replace(named, data=replace(named.data, train=str(moved))), launch, run="it").version == "1"


def test_a_jump_of_the_learning_rate_is_told(
    tiny_config: RunConfig, store: str, workers: Callable[..., None], tmp_path: Path
) -> None:
    optim = replace(tiny_config.optim, epochs=1, decay="linear", decay_epoch=0, decay_factor=0.01)
    workers(None)
    train(replace(tiny_config, storage=str(tmp_path / "runs"), optim=optim), Launch(say=lambda text: None), run="it")
    lines: list[str] = []
    resume("it", ResumeOptions(epochs=2), Launch(say=lines.append))
    told = "the factor on the learning rates at step 3 is 0.406, with the old one it would be 0.01"
    assert any(told in line for line in lines), lines


def test_a_run_lives_in_a_store_alone(
    tiny_config: RunConfig, store: str, workers: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path, written=True)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # the store of an earlier test had another address
    lines: list[str] = []
    config = replace(tiny_config, storage="s3://sets/runs", optim=replace(tiny_config.optim, max_steps=1))
    longer = replace(config, optim=replace(config.optim, max_steps=2))
    try:
        workers(None)
        assert str(train(config, Launch(say=lines.append), run="it").folder) == "s3://sets/runs/it"
        outcome = train(longer, Launch(say=lines.append), run="it", accept_change=True)
        assert resume("s3://sets/runs/it", launch=Launch(say=lines.append)) == outcome
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
    assert any("continues at step 1 of 2" in line for line in lines)
    assert runs_in_mlflow() == ["FINISHED"]


def test_a_run_of_a_release_without_records_is_resumed(
    named: RunConfig, store: str, launch: Launch, workers: Callable[..., None]
) -> None:
    workers(Interrupted("stopped at a checkpoint"))
    with pytest.raises(Interrupted):
        train(named, launch)
    (folder,) = Path(named.storage).iterdir()
    (folder / "run.json").unlink()
    workers(None)
    assert resume("tiny", launch=launch).version == "1"
    (folder / "run.json").unlink()
    with pytest.raises(RunConfigError, match=r"is finished: 1 steps, registered; .* give --epochs N"):
        resume("tiny", launch=launch)
    assert runs_in_mlflow() == ["FINISHED"]
