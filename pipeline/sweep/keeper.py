"""Keeper of the trials' processes: starts them when Ray Tune starts a trial, and stops them when it ends one early."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from ray.tune import Callback

from pipeline.checkpoint.location import Location
from pipeline.driver.record import RunRecord, read_record
from pipeline.errors import PipelineError, Postponed
from pipeline.sweep.parent import ParentRun
from pipeline.sweep.process import Point, TrialProcess
from pipeline.sweep.record import Stopped
from pipeline.sweep.trials import Trial
from shards.errors import ShardError

Say = Callable[[str], None]


@dataclass
class TrialState:
    """A trial of a sweep as the keeper knows it."""

    trial: Trial
    command: Sequence[str]
    folder: Location
    """Location of its run."""
    total_steps: int
    epochs: float
    process: TrialProcess | None = None
    adopted: bool = False
    stopped: Stopped | None = None
    problem: str = ""
    """Last line of a process that failed."""
    postponed: bool = False
    """True if the process ended with status 75 without being asked to."""

    def run(self) -> RunRecord | None:
        """Return the record of the run, None before it has one."""
        with suppress(PipelineError, ShardError, OSError):
            return read_record(self.folder)
        return None


@dataclass
class Sweep:
    """Data that the keeper and the trials share."""

    states: Mapping[str, TrialState]
    parent: ParentRun
    scratch: Path
    say: Say
    save: Callable[[Mapping[str, Stopped]], None]
    """Keep the trials that were ended early."""
    lock: Lock = field(default_factory=Lock)

    def points(self, state: TrialState) -> list[Point]:
        """Return what the run of a trial has reported, nothing while MLflow is away; later looks bring it."""
        from pipeline.tracking.mlflow_client import unavailable

        with suppress(*unavailable()):
            return self.all_points(state)
        return []

    def all_points(self, state: TrialState) -> list[Point]:
        """Return what the run of a trial has reported, and make it a child of the sweep's run."""
        record = state.run()
        if record is None or not record.run_id:
            return []
        with self.lock:
            if not state.adopted:
                self.parent.adopt(record.run_id, state.trial.values)
                state.adopted = True
            return self.parent.points(record.run_id)


class Keeper(Callback):  # type: ignore[misc]
    """Callback of Ray Tune, in the process of the sweep."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep

    def __getstate__(self) -> dict[str, object]:
        """Return nothing: Ray Tune writes its callbacks to a file to restore them later, which no sweep does."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Start the process of a trial, or report again what one that has ended reported."""
        sweep = self._sweep
        state = sweep.states[trial.config["trial"]]
        name = state.trial.name
        state.process = TrialProcess(name, sweep.scratch / name, state.total_steps, lambda: sweep.points(state))
        record = state.run()
        if state.stopped is not None or (record is not None and record.status == "finished" and not record.unsent):
            state.process.replay()
        else:
            state.process.start(state.command)
            sweep.say(f"{name} {'continues' if record else 'starts'}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print an evaluation of a trial that runs."""
        state = self._sweep.states[trial.config["trial"]]
        if state.process is not None and state.process.runs:
            metric = self._sweep.parent.metric
            self._sweep.say(f"{state.trial.name} epoch {result['epoch']:g}: {metric} {result[metric]:.4g}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Stop the process of a trial that Ray Tune ends early; it saves, and could continue."""
        sweep, state = self._sweep, self._sweep.states[trial.config["trial"]]
        process = state.process
        if process is None or not process.runs:
            if process is not None and process.status == 0:
                sweep.say(f"{state.trial.name} finished")
            return
        process.stop()
        if process.status != Postponed.exit_status:
            if process.status:
                self.on_trial_error(iteration, trials, trial)
            return
        result = trial.last_result
        state.stopped = Stopped(float(result["epoch"]), float(result[sweep.parent.metric]))
        stopped = {name: other.stopped for name, other in sweep.states.items() if other.stopped is not None}
        sweep.save(stopped)
        sweep.say(f"{state.trial.name} ended early at epoch {result['epoch']:g}; its last step is saved")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Keep the reason for which a trial's process failed."""
        state = self._sweep.states[trial.config["trial"]]
        process = state.process
        if process is None:
            state.problem = "it did not start"
            return
        process.stop()  # it runs on if only the actor that stands for it has died
        state.postponed = process.status == Postponed.exit_status
        state.problem = process.last_line or f"its process ended with status {process.status}"
        self._sweep.say(f"{state.trial.name}: {state.problem} (output: {process.folder / 'log'})")

    def stop_all(self) -> None:
        """Ask all processes to save and end, and wait for that."""
        processes = [state.process for state in self._sweep.states.values() if state.process is not None]
        for process in processes:
            process.ask_to_stop()
        for process in processes:
            process.wait()
