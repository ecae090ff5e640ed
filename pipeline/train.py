"""The driver of a run: check it, create it in MLflow, run its workers, conclude, register the best checkpoint.

A run is created once; every attempt at it (`detr resume` after whatever stopped it) goes through `_see_through`.
"""

from __future__ import annotations

import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import checkpoint, saved
from pipeline.asynchronous import SPOOL
from pipeline.checkpoint_store import Location, home_of
from pipeline.config import RunConfig, from_json, to_json
from pipeline.errors import CheckpointError, Interrupted, RunConfigError, TrainingError
from pipeline.identity import Changes, continuation
from pipeline.launch import run_workers
from pipeline.mlflow_events import EventSender
from pipeline.mlflow_store import (
    CONFIG_ARTIFACT,
    TAG_EPOCHS,
    TAG_FOLDER,
    TAG_STREAM,
    TAG_TOTAL_STEPS,
    TAG_TRAIN_DIGEST,
    answering,
    connect,
    create_run,
    find_run,
    read_config,
    set_final_status,
    tracking_uri,
)
from pipeline.spool import drain, unsent
from pipeline.track import TAG_LEFT_OUT, TAG_PHASE
from pipeline.waiting import TAG_ROOM
from pipeline.weights import INITIAL_NAME

if TYPE_CHECKING:
    from mlflow import MlflowClient

Say = Callable[[str], None]
_SPOOLS = ("spool", SPOOL)


def say(text: str) -> None:
    """A line for the person who waits, at once also where stdout is a file."""
    print(text, flush=True)


@dataclass(frozen=True)
class Launch:
    """How to start, as opposed to what: none of it changes the result."""

    address: str | None = None
    """A Ray cluster (`auto`, `HOST:6379` or `ray://...`); by default RAY_ADDRESS, else a local one is started."""
    verbose: bool = False
    say: Say = say


class BusyError(TrainingError):
    """Another driver is at work on this run."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind."""

    run_id: str
    folder: Path
    best: Location
    metrics: dict[str, float]
    version: str
    model_name: str
    is_best: bool
    """Whether `@best` is this version; an earlier one of higher AP on the same data keeps the alias."""


def train(config: RunConfig, launch: Launch | None = None) -> Outcome:
    """Start a new run and see it through. Everything that can be wrong is checked before Ray starts."""
    from pipeline.preflight import check, check_storage, prepare

    launch = launch or Launch()
    check(config)
    check_storage(config)
    client = connect()
    config, ready = prepare(config, launch.say)
    total = ready.schedule.total_steps
    with answering():
        run_id = create_run(
            client,
            config,
            {
                "training": (ready.train.name, ready.train.digest, ready.train.url),
                "validation": (ready.val.name, ready.val.digest, ready.val.url),
            },
            {
                TAG_TRAIN_DIGEST: ready.train.digest,
                "detr.val_digest": ready.val.digest,
                "detr.initial_weights": "; ".join(ready.said),
                TAG_TOTAL_STEPS: str(total),
                TAG_EPOCHS: str(min(config.optim.epochs, ready.schedule.epoch(total))),
                TAG_PHASE: "starting",
            },
        )
        folder = Path(config.storage) / f"{config.run_name}-{run_id[:8]}"
        client.set_tag(run_id, TAG_FOLDER, str(folder))
    with _only_driver(folder, run_id), _recorded(client, run_id):
        ready.place(folder)
        home = home_of(config.checkpoint.store, folder)
        launch.say(f"run {config.run_name} ({run_id[:8]}): {total} steps, checkpoints in {home / 'checkpoints'}")
        _run(config, run_id, folder, launch)
        return _conclude(client, config, run_id, folder, launch)


def resume(name: str, changes: Changes | None = None, launch: Launch | None = None) -> Outcome:
    """Go on with a run, by id, name or registered version, from its newest checkpoint.

    A run that was trained to its end but not registered is registered; one that is all done is refused.
    """
    from pipeline.data import open_data
    from pipeline.optim import Schedule
    from pipeline.preflight import check_data
    from pipeline.registry import run_of

    launch, changes = launch or Launch(), changes or Changes()
    client = connect()
    with answering():
        run = find_run(client, run_of(client, name) if name.startswith("models:/") else name)
        run_id, folder = str(run.info.run_id), Path(run.data.tags[TAG_FOLDER])
        original = from_json(read_config(client, run_id))
    home = home_of(original.checkpoint.store, folder)
    newest = saved.newest_of_run(home, folder)
    if newest is None and not (folder / INITIAL_NAME).exists():
        raise CheckpointError(f"{home} holds no checkpoint of run {name}; expected one: is its storage mounted here?")
    config = changes.of(original)
    if changes.data is not None:
        check_data(config)
    train, _ = open_data(config.data)
    meta = checkpoint.read_meta(newest) if newest else None
    way = continuation(meta, config, train, changes.accept)
    schedule = Schedule(config.optim, train.images, config.data.epoch_tail, way.origin)
    step = meta.step if meta else 0
    trained = (
        newest is not None
        and step >= schedule.total_steps
        and checkpoint.read_evaluation(newest) is not None
        and not checkpoint.waiting(home)
    )
    if trained and run.info.status == "FINISHED":
        if any(unsent(folder / name) for name in _SPOOLS):
            with _only_driver(folder, run_id):
                launch.say("sending what MLflow had not taken when the run ended")
                _send_rest(run_id, folder, launch)
        raise RunConfigError(
            f"run {run.info.run_name} ({run_id[:8]}) is finished: {step} steps, registered; "
            "expected one that has steps left: give --epochs N to train it further"
        )
    with _only_driver(folder, run_id), _recorded(client, run_id):
        if config != original:
            # Parameters of a run cannot change; the artifact is what the next resume reads.
            client.log_text(run_id, to_json(config).decode(), CONFIG_ARTIFACT)
        launch.say(f"run {run.info.run_name} ({run_id[:8]}) goes on at step {step} of {schedule.total_steps}")
        if way.changes:
            launch.say(f"warning: {way.told(train.images)}")
            client.set_tag(run_id, TAG_STREAM, way.appended_to(run.data.tags.get(TAG_STREAM, "")))
            client.set_tag(run_id, TAG_TRAIN_DIGEST, train.digest)
        client.set_tag(run_id, TAG_TOTAL_STEPS, str(schedule.total_steps))
        client.set_tag(run_id, TAG_EPOCHS, str(schedule.epoch(schedule.total_steps)))
        client.set_tag(run_id, TAG_PHASE, "starting")
        if run.data.tags.get(TAG_ROOM):
            client.set_tag(run_id, TAG_ROOM, "")  # of a driver that was killed while it waited
        if trained:
            _send_rest(run_id, folder, launch)
        else:
            client.update_run(run_id, status="RUNNING")
            _run(config, run_id, folder, launch, accept_change=bool(way.changes))
        return _conclude(client, config, run_id, folder, launch)


@contextmanager
def _recorded(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Whatever ends the block, MLflow says so: finished, stopped or failed.

    Raises `TrackingError` where MLflow does not answer the driver.
    """
    try:
        with answering(f"everything that the run has saved is kept: `detr resume {run_id[:8]}` does the rest"):
            yield
    except (KeyboardInterrupt, SystemExit, Interrupted):
        set_final_status(client, run_id, "stopped", "KILLED", say)
        raise Interrupted(
            f"stopped; everything up to the last checkpoint is kept: `detr resume {run_id[:8]}` goes on"
        ) from None
    except BaseException:
        set_final_status(client, run_id, "failed", "FAILED", say)
        raise
    set_final_status(client, run_id, "finished", "FINISHED", say)


def _run(config: RunConfig, run_id: str, folder: Path, launch: Launch, accept_change: bool = False) -> None:
    """Run the workers, then send what they could not."""
    try:
        run_workers(
            config,
            run_id,
            folder,
            address=launch.address,
            verbose=launch.verbose,
            say=launch.say,
            accept_change=accept_change,
        )
    finally:
        _send_rest(run_id, folder, launch)


def _send_rest(run_id: str, folder: Path, launch: Launch) -> None:
    """Send what those who wrote the run's spools could not."""
    for spool in (folder / name for name in _SPOOLS):
        if not drain(spool, EventSender(tracking_uri(), run_id, spool)):
            launch.say(
                f"warning: MLflow did not take all points; the rest is kept in {spool} for the next `detr resume`"
            )


@contextmanager
def _only_driver(folder: Path, run_id: str) -> Iterator[None]:
    """Two drivers would write one spool and delete each other's unfinished checkpoints. A kill lets go of the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "driver.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise BusyError(
                f"run {run_id[:8]} is being trained by {file.read().strip() or 'another process'}; expected one driver: "
                "wait for it, or stop it first"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def _conclude(client: MlflowClient, config: RunConfig, run_id: str, folder: Path, launch: Launch) -> Outcome:
    """Register the best checkpoint."""
    from pipeline.registry import register

    home = home_of(config.checkpoint.store, folder)
    found = checkpoint.best(home)
    if found is None:
        raise TrainingError(f"the run ended without an evaluated checkpoint in {home}; expected one at its last step")
    best, metrics = found
    client.set_tag(run_id, TAG_PHASE, "registering")
    missed = client.get_run(run_id).data.tags.get(TAG_LEFT_OUT)
    if missed:
        launch.say(f"warning: left out {missed}")
    registered = register(
        client, run_id, config, best, metrics, name=config.model_name, alias="best", only_if_better=True
    )
    if not registered.alias_moved:
        launch.say(f"models:/{config.model_name}@best stays where it was: that version's AP is higher")
    return Outcome(run_id, folder, best, metrics, registered.version, config.model_name, registered.alias_moved)
