"""A sweep from its command to its table: trials on Ray Tune, a parent run in MLflow, the best trial registered."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location, checkpoint_root, location
from pipeline.config import RunConfig, from_json
from pipeline.driver import preflight
from pipeline.driver.record import check_name
from pipeline.driver.sole_driver import sole_driver
from pipeline.errors import Interrupted, Postponed, RunConfigError, TrackingAway, TrainingError
from pipeline.recipes import uses_built_in
from pipeline.run_folder import scratch
from pipeline.schedule import Schedule
from pipeline.sweep.parent import ParentRun, parent_run
from pipeline.sweep.process import Point
from pipeline.sweep.record import SweepRecord, open_record, write_sweep
from pipeline.sweep.results import EARLY, Result, result_columns, results_table
from pipeline.sweep.trials import Trial, check_distinct
from pipeline.tracking.mlflow_client import connect, translated_errors, unavailable
from pipeline.tracking.mlflow_runs import read_config

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.sweep.keeper import Sweep, TrialState
    from pipeline.sweep.tuning import Tuning

Say = Callable[[str], None]


@dataclass(frozen=True)
class SweepPlan:
    """A sweep that is ready to run."""

    name: str
    recipe: str
    trials: Sequence[Trial]
    configs: Sequence[RunConfig]
    """Configuration of each trial, checked."""
    tuning: Tuning
    address: str | None = None
    verbose: bool = False


def run_sweep(plan: SweepPlan, say: Say) -> str:
    """Run the trials that have not ended, and return the table of all.

    Raise `Interrupted` if the sweep was stopped, and `Postponed` if trials can continue later: the same command does so.
    """
    check_name(plan.name)
    check_distinct(plan.trials)
    for trial in plan.trials:
        check_name(trial.name)
    config = plan.configs[0]
    _check_data(plan, say)
    storage = location(config.storage)
    storage = storage.absolute() if isinstance(storage, Path) else storage
    folder = storage / plan.name
    with sole_driver(folder, plan.name, say):
        tuning = plan.tuning
        record = open_record(folder, plan.name, plan.recipe, tuning.metric, tuning.mode, plan.trials)
        client = _connected(known=bool(record.run_id))
        with _postponed(), translated_errors():
            parent = parent_run(client, config, record)
            record = record.but(run_id=parent.run_id)
            write_sweep(folder, record)
            parent.set_status("RUNNING")
            return _run(plan, record, folder, storage, client, parent, say)


def _connected(*, known: bool) -> MlflowClient:
    """Return a client of MLflow; only a sweep that it has answered before may take its silence for an outage."""
    if not known:
        return connect()
    with _postponed():
        return connect()


def _check_data(plan: SweepPlan, say: Say) -> None:
    """Check what the trials read, once for trials with the same data; make built-in data before trials race for it."""
    seen: set[tuple[str, str]] = set()
    for config in plan.configs:
        used = (config.data.train, config.data.val)
        if used in seen:
            continue
        seen.add(used)
        if uses_built_in(config):
            from pipeline.built_in.dataset import make_built_in

            make_built_in(config, say)
        preflight.check(config)
        preflight.check_storage(config)


def _run(
    plan: SweepPlan,
    record: SweepRecord,
    folder: Location,
    storage: Location,
    client: MlflowClient,
    parent: ParentRun,
    say: Say,
) -> str:
    from pipeline.sweep.keeper import Keeper, Sweep, TrialState
    from pipeline.sweep.tuning import fitting_trials, ray_for_trials, tune_trials

    files = scratch(f"sweep-{parent.run_id}")
    shutil.rmtree(files / "tune", ignore_errors=True)  # of an earlier command; the trials' runs are the state

    def save(stopped: Any) -> None:
        write_sweep(folder, record.but(stopped={**record.stopped, **stopped}))

    status = "FAILED"
    try:
        with ray_for_trials(plan.configs[0], plan.address, verbose=plan.verbose) as address:
            states = {}
            for trial, config in zip(plan.trials, plan.configs, strict=True):
                steps = (schedule := _schedule(config)).total_steps
                states[trial.name] = TrialState(
                    trial,
                    _command(plan, trial, address),
                    storage / trial.name,
                    steps,
                    schedule.epoch(steps),
                    stopped=record.stopped.get(trial.name),
                )
            tuning = plan.tuning
            if not tuning.parallel:
                tuning = replace(tuning, parallel=min(fitting_trials(plan.configs[0]), len(states)))
            sweep = Sweep(states, parent, files, say, save)
            keeper = Keeper(sweep)
            say(f"sweep {plan.name}: {len(states)} trials, {tuning.parallel} at a time; output of each in {files}")
            try:
                tune_trials(
                    {name: state.epochs / state.total_steps for name, state in states.items()},
                    files,
                    tuning,
                    epochs=max(state.epochs for state in states.values()),
                    keeper=keeper,
                    verbose=plan.verbose,
                )
            finally:
                keeper.stop_all()
        with translated_errors("the trials have saved"):
            table = _conclude(plan, sweep, client, say)
        status = "FINISHED"
        return table
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise Interrupted("the sweep was stopped, and its trials have saved; the same command continues") from None
    except Postponed:
        status = "KILLED"
        raise
    except TrackingAway:
        status = "KILLED"
        raise
    finally:
        with suppress(*unavailable()):  # another error may be on its way
            parent.set_status(status)


@contextmanager
def _postponed() -> Iterator[None]:
    """Raise `Postponed` if MLflow is away: the same command continues the sweep."""
    try:
        yield
    except TrackingAway as error:
        raise Postponed(f"{error}; the same command continues the sweep") from None


def _schedule(config: RunConfig) -> Schedule:
    from pipeline.data.datasets import open_data

    train, _ = open_data(config.data)
    return Schedule(config.optim, train.images, config.data.epoch_tail)


def _command(plan: SweepPlan, trial: Trial, address: str) -> list[str]:
    """Return the command of a trial. The sweep registers the best trial itself, so that not all become versions."""
    register = [] if "--track.register" in trial.options else ["--track.register", "never"]
    words = ["train", plan.recipe, *trial.options, *register, "--run", trial.name]
    return [sys.executable, "-P", "-m", "jobs.cli", *words, "--address", address]


def _conclude(plan: SweepPlan, sweep: Sweep, client: MlflowClient, say: Say) -> str:
    """Register the best trial, keep the table of all, and return it."""
    results = [_result(plan, sweep, state) for state in sweep.states.values()]
    better = max if plan.tuning.mode == "max" else min
    scored = [result for result in results if result.best is not None]
    if scored:
        best = better(scored, key=lambda result: result.best or 0.0)
        sweep.parent.finish(best.trial.name, best.best or 0.0, result_columns(results, plan.tuning.metric))
        version = _register(client, sweep.states[best.trial.name])
        say(f"best        {best.trial.name}, {plan.tuning.metric} {best.best:.4g}, registered as {version}")
    early = next((result.trial.name for result in results if result.status == EARLY), None)
    if early:
        say(f"trials that ended early have saved; `detr resume {early}` continues one")
    table = results_table(results, plan.tuning.metric)
    later = [state for state in sweep.states.values() if state.postponed]
    if later:
        raise Postponed(f"{later[0].trial.name}: {later[0].problem}; the same command continues the sweep")
    failed = [state for state in sweep.states.values() if state.problem]
    if failed:
        say(table)
        raise TrainingError(
            f"{len(failed)} of {len(results)} trials failed, the first {failed[0].trial.name}: {failed[0].problem}"
        )
    return table


def _result(plan: SweepPlan, sweep: Sweep, state: TrialState) -> Result:
    points: list[Point] = sweep.all_points(state)
    better = max if plan.tuning.mode == "max" else min
    record = state.run()
    status = EARLY if state.stopped and not (record and record.status == "finished") else ""
    if state.problem:
        status = "failed"
    total = state.total_steps
    return Result(
        trial=state.trial,
        status=status or (record.status if record else "not started"),
        epoch=state.epochs * points[-1].step / total if points else 0.0,
        best=better(point.value for point in points) if points else None,
    )


def _register(client: MlflowClient, state: TrialState) -> str:
    """Register the best checkpoint of a trial, and return the address of the version."""
    from pipeline.registry.registration import register

    record = state.run()
    if record is None:
        raise RunConfigError(f"{state.folder} has no record of a run any more; expected one: was it deleted?")
    config = from_json(read_config(client, record.run_id))
    found = catalog.best(checkpoint_root(config.checkpoint.store, state.folder))
    if found is None:
        raise TrainingError(f"{state.folder} has no evaluated checkpoint; expected one, as it reported a figure")
    path, metrics = found
    made = register(
        client, record.run_id, config, path, metrics, name=config.model_name, alias="best", only_if_better=True
    )
    return f"models:/{config.model_name}/{made.version}{' (@best)' if made.alias_moved else ''}"
