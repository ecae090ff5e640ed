"""The flags of `detr train` and `detr resume` on their way to the functions behind them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.clusters import Ray
from jobs.commands import runs
from jobs.commands.requests import read_request
from jobs.parsing import UsageError
from jobs.training import known_config, parse_train
from pipeline.config import from_json
from pipeline.driver.changes import ResumeOptions, differences
from pipeline.driver.record import Outcome, new_record, write_record
from pipeline.errors import Postponed, RunConfigError
from pipeline.recipes import RECIPES
from shards.errors import ShardError
from shards.store.retry import StoreError
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
    config = called["fit"](None)
    assert (config.transform.eval_size, config.model.num_queries) == (64, 20)
    assert (config.optim.epochs, config.optim.decay_epoch) == (7, 2)
    assert "--model.num-queries 20: an image has up to" in capsys.readouterr().out
    runs.show(words)
    shown = capsys.readouterr()
    assert from_json(shown.out) == config
    assert "--model.num-queries 20: an image has up to" in shown.err
    runs.show(["small"])
    assert from_json(capsys.readouterr().out) == RECIPES["small"]
    runs.train(["small", "--data.train", f"{tiny_data.train}/absent"])
    with pytest.raises(ShardError, match=r"no manifest\.json here"):
        called["fit"](None)


@pytest.fixture
def small(tmp_path: Path, tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the command of a finished run of `small`, which had other data when it was made."""
    monkeypatch.setattr(runs, "_print_outcome", lambda _: None)
    words = ["small", "--storage", str(tmp_path), "--data.train", tiny_data.train, "--run", "it"]
    optim = replace(RECIPES["small"].optim, epochs=33, decay_epoch=11)
    config = replace(RECIPES["small"], optim=optim, model=replace(RECIPES["small"].model, num_queries=70))
    record = new_record("it", config, config, ("", "")).but(run_id="0123456789")
    write_record(
        tmp_path / "it",
        record.with_outcome(Outcome("0123456789", tmp_path, tmp_path, {}, "3", "detr-small", True), unsent=False),
    )
    return words


def test_a_known_run_keeps_what_its_data_chose(small: list[str], called: dict[str, Any], tiny_data: TinyData) -> None:
    config = known_config(parse_train(small, "detr train").config, "it")  # type: ignore[union-attr]
    assert config is not None
    runs.train([*small, "--optim.epochs", "99", "--compute.no-channels-last"])
    again = called["fit"](config)
    assert (again.optim.epochs, again.optim.decay_epoch, again.model.num_queries) == (99, 11, 70)
    assert (again.data.train, again.compute.channels_last) == (tiny_data.train, False)
    differing = differences(config, again)
    assert (list(differing.acceptable), list(differing.refused)) == (["optim.epochs"], [])


def test_a_finished_run_answers_without_its_data(
    small: list[str], tiny_data: TinyData, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.train([*small, "--data.train", f"{tiny_data.train}/absent"])
    assert "is finished and registered as models:/detr-small/3" in "".join(capsys.readouterr())


def test_a_run_whose_store_is_away_is_tried_again(
    small: list[str], tiny_data: TinyData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(folder: object) -> None:
        raise StoreError("no answer")

    monkeypatch.setattr("pipeline.train.read_record", away)
    with pytest.raises(Postponed, match="the same command looks again later"):
        runs.train([*small, "--data.train", f"{tiny_data.train}/absent"])


def test_a_submitted_training_is_fitted_where_its_data_are_seen(tiny_data: TinyData, tmp_path: Path) -> None:
    words = ["--data.train", tiny_data.train, "--data.val", tiny_data.val, "--storage", str(tmp_path)]
    for on_cluster, epochs in (((), 144), ((tiny_data.train,), 35)):
        lab = Ray(name="lab", address="http://head:8265", on_cluster=on_cluster)
        for command in (["train", "small"], ["sweep", "many", "small", "--seed", "1,2"]):
            config = read_request(lab, [*command, *words]).config
            assert config is not None
            assert config.optim.epochs == epochs


def test_a_submitted_training_continues_the_run_that_is_seen(small: list[str]) -> None:
    config = read_request(Ray(name="lab", address="http://head:8265"), ["train", *small]).config
    assert config is not None
    assert (config.optim.epochs, config.model.num_queries) == (33, 70)
