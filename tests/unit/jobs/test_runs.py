"""The flags of `detr train` and `detr resume` on their way to the functions behind them."""

from typing import Any

import pytest

from jobs.commands import runs
from jobs.parsing import UsageError
from pipeline.driver.changes import ResumeOptions
from pipeline.errors import RunConfigError


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return a dictionary that gets the arguments of `train` and `resume`, which do nothing."""
    arguments: dict[str, Any] = {}
    monkeypatch.setattr("pipeline.train.train", lambda *given, **named: arguments.update(train=given, **named))
    monkeypatch.setattr("pipeline.train.resume", lambda *given: arguments.update(resume=given))
    monkeypatch.setattr(runs, "_print_outcome", lambda _: None)
    return arguments


@pytest.mark.parametrize("workers", [["--cluster.min-workers=2"], ["--cluster.min_workers", "2"]])
def test_a_resume_takes_the_options_that_a_flag_names(called: dict[str, Any], workers: list[str]) -> None:
    runs.resume(["it", *workers, "--compute.recompute", "both", "--compute.no-channels-last", "--epochs", "3"])
    name, options, _ = called["resume"]
    changes = {"recompute": "both", "channels_last": False}
    assert (name, options) == ("it", ResumeOptions(epochs=3, cluster={"min_workers": 2}, compute=changes))


def test_a_resume_without_flags_changes_nothing(called: dict[str, Any]) -> None:
    runs.resume(["it"])
    assert called["resume"][1] == ResumeOptions()


def test_a_run_s_name_is_its_key(called: dict[str, Any]) -> None:
    runs.train(["overfit", "--run", "it", "--accept-change"])
    assert (called["run"], called["accept_change"]) == ("it", True)
    runs.train(["overfit", "--run", "it", "--smoke"])
    assert called["run"] == "it-smoke"
    runs.train(["overfit"])
    assert called["run"] == ""


def test_two_names_for_a_run_are_refused() -> None:
    with pytest.raises(UsageError, match="expected one of them"):
        runs.train(["overfit", "--run", "it", "--track.run-name", "other"])
    with pytest.raises(RunConfigError, match=r"the run's name is '\.\./it'"):
        runs.train(["overfit", "--run", "../it"])
