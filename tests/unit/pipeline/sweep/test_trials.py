"""Trials of a sweep: combinations of flags, files, and the record that the same command reads again."""

from pathlib import Path

import pytest

from jobs.commands.sweep import divided, trials_of
from jobs.parsing import UsageError
from jobs.training import parse_train
from pipeline.config import RunConfig
from pipeline.driver.record import check_name, new_record, write_record
from pipeline.errors import RunConfigError
from pipeline.sweep.record import Stopped, open_record, write_sweep
from pipeline.sweep.results import Result, file_table, result_columns, results_table
from pipeline.sweep.sweep_file import find_sweep_file, shipped
from pipeline.sweep.trials import Trial, check_distinct, combinations

WORDS = ["--optim.lr", "1e-4,2e-4", "--model.masks", "--seed=1,2", "--data.train", "s3://b/t"]


def test_each_combination_is_a_run_with_its_values_in_the_name() -> None:
    trials = combinations("lr", WORDS)
    assert [trial.name for trial in trials] == [f"lr-lr={lr}-seed={seed}" for lr in ("1e-4", "2e-4") for seed in "12"]
    common = ("--model.masks", "--data.train", "s3://b/t")
    assert trials[1].options == (*common, "--optim.lr", "1e-4", "--seed", "2")
    assert trials[1].values == {"optim.lr": "1e-4", "seed": "2"}
    for trial in trials:
        check_name(trial.name)


def test_names_are_names_of_runs_whatever_the_values() -> None:
    words = ["--data.train", "s3://b/a b,/x", "--initial", "models:/m@best,w.pth", "--data.val", "v,w"]
    trials = combinations("it", words)
    for trial in trials:
        check_name(trial.name)
    assert trials[0].name == "it-train=s3-b-a-b-initial=models-m-best-val=v"
    long = combinations("it", ["--data.train", f"{'x' * 200},{'y' * 200}"])
    assert [trial.name for trial in long] == ["it-000", "it-001"]
    with pytest.raises(RunConfigError, match=r"two trials of the sweep are named it-lr=1-2"):
        check_distinct(combinations("it", ["--optim.lr", "1/2,1-2"]))


@pytest.mark.parametrize("values", ["1,", "1,1"])
def test_values_must_be_several(values: str) -> None:
    with pytest.raises(RunConfigError, match=r"--seed is .1,1?.; expected different values"):
        combinations("it", ["--seed", values])


def test_too_many_trials_are_refused() -> None:
    numbers = ",".join(map(str, range(40)))
    with pytest.raises(RunConfigError, match="1,600 trials"):
        combinations("it", ["--seed", numbers, "--optim.epochs", numbers])


def test_options_of_the_sweep_and_of_its_trials_may_be_mixed() -> None:
    own, words = divided(
        ["it", "demo", "--seed", "1,2", "--early-stop", "asha", "--model.masks", "--grace=2", "--verbose"]
    )
    assert own == ["it", "demo", "--early-stop", "asha", "--grace=2", "--verbose"]
    assert words == ["--seed", "1,2", "--model.masks"]
    assert divided(["--help"]) == (["--help"], [])


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_trial_of_a_shipped_sweep_is_a_run_that_can_be_trained(name: str) -> None:
    recipe, trials = trials_of("it", name, ["--optim.epochs", "150"])
    configs = []
    for trial in trials:
        options = parse_train([recipe, *trial.options, "--run", trial.name], "detr train")
        assert options is not None
        assert options.config.optim.epochs == 150
        assert trial.published["AP"] > 30
        configs.append(options.config)
    assert len(trials) >= 2
    assert len(set(map(str, configs))) == len(configs)  # all differ
    assert "Carion et al., 2020, table" in file_table(shipped()[name])


def test_a_file_of_a_user_names_its_mistake(tmp_path: Path) -> None:
    path = tmp_path / "it.toml"
    path.write_text('title = "t"\nrecipe = "demo"\n[[trials]]\nname = "a"\noption = []\n')
    with pytest.raises(RunConfigError, match=r"unknown field `option`") as caught:
        find_sweep_file(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(RunConfigError, match="No such file"):
        find_sweep_file(str(tmp_path / "absent.toml"))
    with pytest.raises(UsageError, match=r"there is no recipe or sweep 'encoder-layer'; did you mean encoder-layers\?"):
        trials_of("it", "encoder-layer", [])


def test_the_same_command_finds_its_sweep_and_another_one_is_refused(tmp_path: Path) -> None:
    trials = combinations("it", ["--seed", "1,2"])

    def opened(trials: list[Trial] = trials, metric: str = "val/AP") -> object:
        return open_record(tmp_path, "it", "demo", metric, "max", trials)

    record = open_record(tmp_path, "it", "demo", "val/AP", "max", trials)
    stopped = {"it-seed=1": Stopped(2.0, 0.1)}
    write_sweep(tmp_path, record.but(run_id="0123", stopped=stopped))
    again = open_record(tmp_path, "it", "demo", "val/AP", "max", combinations("it", ["--seed", "1,2,3"]))
    assert (again.run_id, again.stopped, len(again.trials)) == ("0123", stopped, 3)
    with pytest.raises(RunConfigError, match="--metric val/AP"):
        opened(metric="val/AP50")
    with pytest.raises(RunConfigError, match=r"trial it-seed=1 was started with --seed 1; expected the same options"):
        opened(combinations("it", ["--optim.lr", "1.0", "--seed", "1,2"]))


def test_a_sweep_does_not_take_the_name_of_a_run(tmp_path: Path) -> None:
    config = RunConfig()
    write_record(tmp_path, new_record("it", config, config, ("", "")))
    with pytest.raises(RunConfigError, match="is a run"):
        open_record(tmp_path, "it", "demo", "val/AP", "max", [])


def test_results_stand_beside_what_was_published() -> None:
    trials = [Trial("it-a", (), {"trial": "a"}, {"AP": 40.6}), Trial("it-b", (), {"trial": "b"})]
    results = [Result(trials[0], "finished", 300.0, 0.4012), Result(trials[1], "ended early", 3.0, None)]
    rows = [line.split() for line in results_table(results, "val/AP").splitlines()]
    assert rows[0] == ["trial", "status", "epoch", "val/AP", "published"]
    assert rows[2] == ["it-a", "finished", "300", "0.4012", "0.4060"]
    assert rows[3] == ["it-b", "ended", "early", "3", "-", "-"]
    assert result_columns(results, "val/AP")["val/AP"] == [0.4012, None]
    assert "published" not in results_table([Result(trials[1], "running", 1.0, 0.1)], "val/AP")
