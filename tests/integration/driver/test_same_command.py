"""A command of a run's name that comes again: the same run, whatever became of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.driver import work
from pipeline.errors import (
    Interrupted,
    RunConfigError,
    TrainingError,
)
from pipeline.train import Launch, resume, train
from tests.support.workers import runs_in_mlflow


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
