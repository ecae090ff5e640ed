"""Resumed runs: what may differ from before, and stores that are gone, elsewhere or not writable."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import s3fs

from pipeline.checkpoint import catalog
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig
from pipeline.driver.changes import ResumeOptions
from pipeline.errors import (
    CheckpointError,
    Interrupted,
    RunConfigError,
)
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import find_run
from pipeline.tracking.tags import TAG_STREAM, TAG_TOTAL_STEPS
from pipeline.train import Launch, resume, train
from tests.support.s3_server import S3Server
from tests.support.workers import runs_in_mlflow


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
