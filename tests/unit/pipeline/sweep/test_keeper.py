"""The keeper of trials: real processes, and the calls that Ray Tune makes."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from mlflow.exceptions import MlflowException

from pipeline.config import RunConfig
from pipeline.driver.record import Outcome, new_record, write_record
from pipeline.errors import Postponed, TrackingAway
from pipeline.sweep import tuning
from pipeline.sweep.keeper import Keeper, Sweep, TrialState
from pipeline.sweep.process import ENDED, POINTS, Point
from pipeline.sweep.record import Stopped
from pipeline.sweep.sweep import _conclude, _postponed
from pipeline.sweep.trials import Trial
from pipeline.sweep.tuning import Tuning, scheduler, tune_trials
from pipeline.sweep.watch import watch
from tests.support.command import until

SAVES = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready', flush=True)\ntime.sleep(600)"


class Parent:
    """The parent run, with what trials have reported."""

    metric = "val/AP"

    def __init__(self) -> None:
        self.reported: dict[str, list[Point]] = {}
        self.children: list[str] = []

    def adopt(self, run_id: str, values: object) -> None:
        self.children.append(run_id)

    def points(self, run_id: str) -> list[Point]:
        return self.reported.get(run_id, [])


class Bench:
    """A sweep with one trial whose process runs `code`."""

    def __init__(self, folder: Path, code: str) -> None:
        self.folder, self.parent, self.lines = folder, Parent(), list[str]()
        self.saved: dict[str, Stopped] = {}
        command = [sys.executable, "-c", code]
        self.state = TrialState(Trial("it-a", (), {"seed": "1"}), command, folder / "it-a", 9, 3.0)
        parent: Any = self.parent
        self.sweep = Sweep({"it-a": self.state}, parent, folder / "scratch", self.lines.append, self.saved.update)
        self.keeper = Keeper(self.sweep)
        self.trial = SimpleNamespace(config={"trial": "it-a"}, last_result={"epoch": 1.0, "val/AP": 0.25})

    def record(self, config: RunConfig, finished: bool = False) -> None:
        """Write the record that the trial's run has."""
        record = new_record("it-a", config, config, ("", "")).but(run_id="0123", status="running")
        if finished:
            outcome = Outcome("0123", self.state.folder, self.state.folder, {}, "", "m", False)
            record = record.with_outcome(outcome, unsent=False)
        write_record(self.state.folder, record)

    def start(self) -> None:
        self.keeper.on_trial_start(0, [], self.trial)

    def complete(self) -> None:
        self.keeper.on_trial_complete(0, [], self.trial)


def test_a_trial_that_ray_tune_ends_saves_and_is_kept_as_ended_early(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SAVES)
    bench.start()
    process = bench.state.process
    assert process is not None
    until(lambda: process.last_line == "ready", "the process")
    bench.complete()
    assert process.status == 75
    assert bench.saved == {"it-a": Stopped(1.0, 0.25)}
    assert bench.lines == ["it-a starts", "it-a ended early at epoch 1; its last step is saved"]


def test_a_trial_that_ended_early_is_reported_again_and_not_started(tmp_path: Path, tiny_config: RunConfig) -> None:
    bench = Bench(tmp_path, "raise SystemExit(1)")
    bench.record(tiny_config)
    bench.parent.reported["0123"] = [Point(3, 0.1), Point(9, 0.3)]
    bench.state.stopped = Stopped(1.0, 0.1)
    bench.start()
    bench.complete()
    process = bench.state.process
    assert process is not None
    assert process.status is None
    assert (process.folder / ENDED).read_text() == "0"
    assert process.points == [Point(3, 0.1), Point(9, 0.3)]
    assert bench.parent.children == ["0123"]
    assert bench.lines == []


def test_a_finished_run_is_not_started_even_if_it_had_ended_early_before(
    tmp_path: Path, tiny_config: RunConfig
) -> None:
    bench = Bench(tmp_path, "raise SystemExit(1)")
    bench.record(tiny_config, finished=True)
    bench.start()
    assert bench.state.process is not None
    assert bench.state.process.status is None


@pytest.mark.parametrize(("status", "postponed"), [(1, False), (75, True)])
def test_a_failed_process_gives_its_reason(status: int, postponed: bool, tmp_path: Path) -> None:
    bench = Bench(tmp_path, f"print('detr: no such data'); raise SystemExit({status})")
    bench.start()
    assert bench.state.process is not None
    bench.state.process.wait()
    bench.keeper.on_trial_error(0, [], bench.trial)
    assert (bench.state.problem, bench.state.postponed) == ("no such data", postponed)
    assert bench.lines[-1].startswith("it-a: no such data (output: ")


def test_a_process_whose_actor_has_died_saves_and_continues_later(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SAVES)
    bench.start()
    process = bench.state.process
    assert process is not None
    until(lambda: process.last_line == "ready", "the process")
    bench.keeper.on_trial_error(0, [], bench.trial)
    assert (process.status, bench.state.postponed) == (75, True)


def test_an_outage_is_no_figure_at_the_end_of_the_sweep(
    tmp_path: Path, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: str) -> list[Point]:
        raise MlflowException("away")

    bench = Bench(tmp_path, SAVES)
    bench.record(tiny_config, finished=True)
    monkeypatch.setattr(bench.parent, "points", away)
    assert bench.sweep.points(bench.state) == []
    plan: Any = SimpleNamespace(tuning=SimpleNamespace(mode="max", metric="val/AP"))
    client: Any = None
    with pytest.raises(MlflowException):
        _conclude(plan, bench.sweep, client, bench.lines.append)


def test_a_sweep_without_mlflow_is_to_continue() -> None:
    with pytest.raises(Postponed, match="away; the same command continues the sweep"), _postponed():
        raise TrackingAway("away")


def test_all_processes_save_when_the_sweep_is_stopped(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SAVES)
    bench.start()
    process = bench.state.process
    assert process is not None
    until(lambda: process.last_line == "ready", "the process")
    bench.keeper.stop_all()
    assert (process.status, bench.saved) == (75, {})  # it is to be continued, so it has not ended early


def test_ray_tune_takes_the_keeper_and_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes a sweep down before it runs, for which everything must be picklable."""
    bench = Bench(tmp_path, SAVES)
    fitted: list[Any] = []
    monkeypatch.setattr(tuning, "_this_node", lambda: "node:127.0.0.1")
    monkeypatch.setattr("ray.tune.Tuner.fit", lambda tuner: fitted.append(tuner))
    rule = Tuning("train/loss", "min", "asha", grace_epochs=1, reduction=2.0, parallel=2)
    tune_trials({"it-a": 1 / 3}, tmp_path, rule, epochs=3.0, keeper=bench.keeper, verbose=False)
    assert len(fitted) == 1


def test_a_trial_reports_the_epochs_of_its_own_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[float] = []
    monkeypatch.setattr("ray.tune.report", lambda result: reported.append(result["epoch"]))
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        (tmp_path / name / POINTS).write_bytes(msgspec.json.encode(Point(6, 0.1)) + b"\n")
        (tmp_path / name / ENDED).write_text("0")
        watch({"trial": name}, folder=str(tmp_path), metric="val/AP", epochs_per_step={"small": 0.5, "large": 1.0})
    assert reported == [3.0, 6.0]


def test_asha_ends_the_worse_trial_but_none_at_its_last_epoch() -> None:
    rule = scheduler(Tuning("val/AP", "max", "asha", grace_epochs=1, reduction=2.0, parallel=1), epochs=4.0)
    rule.set_search_properties("val/AP", "max")
    decisions = {}
    for name, value in (("good", 0.5), ("bad", 0.1)):
        trial = SimpleNamespace(trial_id=name)
        rule.on_trial_add(None, trial)
        for epoch in (1.0, 2.0, 3.0, 4.0):
            decisions[name, epoch] = rule.on_trial_result(None, trial, {"epoch": epoch, "val/AP": value})
    assert decisions["bad", 1.0] == "STOP"
    assert all(decisions["good", epoch] == "CONTINUE" for epoch in (1.0, 2.0, 3.0, 4.0))
