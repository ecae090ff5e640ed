"""The flags of `detr train` and `detr resume` on their way to the functions behind them."""

from typing import Any

import pytest

from jobs.commands import runs
from jobs.parsing import UsageError
from pipeline.config import from_json
from pipeline.driver.changes import ResumeOptions
from pipeline.errors import RunConfigError
from pipeline.recipes import RECIPES
from shards.errors import ShardError
from tests.support.tiny_data import TinyData


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


def test_the_recipe_for_few_images_is_fitted_to_the_data_and_says_so(
    called: dict[str, Any], tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["small", "--data.train", tiny_data.train, "--data.val", tiny_data.val, "--optim.epochs=7"]
    runs.train(words)
    config = called["train"][0]
    assert (config.transform.eval_size, config.model.num_queries) == (64, 20)
    assert (config.optim.epochs, config.optim.decay_epoch) == (7, 2)
    assert "--model.num-queries 20: an image has up to" in capsys.readouterr().out
    runs.show(words)
    shown = capsys.readouterr()
    assert from_json(shown.out) == config
    assert "--model.num-queries 20: an image has up to" in shown.err
    runs.show(["small"])
    assert from_json(capsys.readouterr().out) == RECIPES["small"]
    with pytest.raises(ShardError, match=r"no manifest\.json here"):
        runs.train(["small", "--data.train", f"{tiny_data.train}/absent"])
