"""Driver of a run: check it, create it in MLflow, run its workers, register the best checkpoint.

`train` creates a run once; `resume` continues it after whatever stopped it. Both run the workers by `_run` and end with
`_conclude`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location, checkpoint_root
from pipeline.cluster.launch import run_workers
from pipeline.config import RunConfig, from_json, to_json
from pipeline.driver.changes import ResumeOptions
from pipeline.errors import CheckpointError, Interrupted, RunConfigError, TrainingError
from pipeline.run_folder import CHECKPOINTS, INITIAL_NAME, only_driver
from pipeline.tracking.mlflow_client import connect, tracking_uri, translated_errors
from pipeline.tracking.mlflow_runs import CONFIG_ARTIFACT, create_run, find_run, read_config, set_final_status
from pipeline.tracking.run_spools import anything_left, send_left
from pipeline.tracking.tags import (
    TAG_EPOCHS,
    TAG_FOLDER,
    TAG_INITIAL_WEIGHTS,
    TAG_LEFT_OUT,
    TAG_PHASE,
    TAG_TOTAL_STEPS,
    TAG_TRAIN_DIGEST,
    TAG_VAL_DIGEST,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient


Say = Callable[[str], None]


def say(text: str) -> None:
    """Print a line for the user, unbuffered even if stdout is a file."""
    print(text, flush=True)


@dataclass(frozen=True)
class Launch:
    """Options of the driver that do not change the result of a run."""

    address: str | None = None
    """Address of a Ray cluster (`auto`, `HOST:6379` or `ray://...`). None: RAY_ADDRESS, or start a local one."""
    verbose: bool = False
    say: Say = say


@dataclass(frozen=True)
class Outcome:
    """Result of a finished run."""

    run_id: str
    folder: Path
    best: Location
    metrics: dict[str, float]
    version: str
    model_name: str
    is_best: bool
    """True if `@best` points at this version; an earlier one with a higher AP on the same data keeps the alias."""


def train(config: RunConfig, launch: Launch | None = None) -> Outcome:
    """Start a new run, train it to its end and register it; check everything that can be checked before Ray starts."""
    from pipeline.driver.preflight import check, check_storage, prepare

    launch = launch or Launch()
    check(config)
    check_storage(config)
    client = connect()
    config, ready = prepare(config, launch.say)
    total = ready.schedule.total_steps
    with translated_errors():
        run_id = create_run(
            client,
            config,
            {
                "training": (ready.train.name, ready.train.digest, ready.train.url),
                "validation": (ready.val.name, ready.val.digest, ready.val.url),
            },
            {
                TAG_TRAIN_DIGEST: ready.train.digest,
                TAG_VAL_DIGEST: ready.val.digest,
                TAG_INITIAL_WEIGHTS: "; ".join(ready.notes),
                TAG_TOTAL_STEPS: str(total),
                TAG_EPOCHS: str(min(config.optim.epochs, ready.schedule.epoch(total))),
                TAG_PHASE: "starting",
            },
        )
        folder = Path(config.storage) / f"{config.run_name}-{run_id[:8]}"
        client.set_tag(run_id, TAG_FOLDER, str(folder))
    with only_driver(folder, run_id), _recorded(client, run_id):
        ready.write_initial_weights(folder)
        root = checkpoint_root(config.checkpoint.store, folder)
        launch.say(f"run {config.run_name} ({run_id[:8]}): {total} steps, checkpoints in {root / CHECKPOINTS}")
        _run(config, run_id, folder, launch)
        return _conclude(client, config, run_id, folder, launch)


def resume(name: str, changes: ResumeOptions | None = None, launch: Launch | None = None) -> Outcome:
    """Continue a run from its newest checkpoint; `name` is its id, its name or a registered version.

    A run that was trained to its end but not registered is registered. Raise `RunConfigError` for a finished run.
    """
    from pipeline.driver.position import position_after
    from pipeline.driver.preflight import check_data
    from pipeline.registry.versions import run_of

    launch, changes = launch or Launch(), changes or ResumeOptions()
    client = connect()
    with translated_errors():
        run = find_run(client, run_of(client, name) if name.startswith("models:/") else name)
        run_id, folder = str(run.info.run_id), Path(run.data.tags[TAG_FOLDER])
        original = from_json(read_config(client, run_id))
    root = checkpoint_root(original.checkpoint.store, folder)
    newest = catalog.newest_of_run(root, folder)
    if newest is None and not (folder / INITIAL_NAME).exists():
        raise CheckpointError(f"{root} holds no checkpoint of run {name}; expected one: is its storage mounted here?")
    config = changes.of(original)
    if changes.data is not None:
        check_data(config)
    position = position_after(config, newest, changes.accept)
    trained = position.is_trained(root)
    if trained and run.info.status == "FINISHED":
        _send_unsent(run_id, folder, launch)
        raise RunConfigError(
            f"run {run.info.run_name} ({run_id[:8]}) is finished: {position.step} steps, registered; "
            "expected one that has steps left: give --epochs N to train it further"
        )
    with only_driver(folder, run_id), _recorded(client, run_id):
        if config != original:
            # Parameters of a run cannot change in MLflow; the next resume reads this artifact.
            client.log_text(run_id, to_json(config).decode(), CONFIG_ARTIFACT)
        total = position.schedule.total_steps
        launch.say(f"run {run.info.run_name} ({run_id[:8]}) continues at step {position.step} of {total}")
        if position.stream.changes:
            launch.say(f"warning: {position.stream.message(position.train.images)}")
        for tag, value in position.tags(run.data.tags).items():
            client.set_tag(run_id, tag, value)
        if trained:
            send_left(folder, run_id, tracking_uri(), launch.say)
        else:
            client.update_run(run_id, status="RUNNING")
            _run(config, run_id, folder, launch, accept_change=bool(position.stream.changes))
        return _conclude(client, config, run_id, folder, launch)


@contextmanager
def _recorded(client: MlflowClient, run_id: str) -> Iterator[None]:
    """Set the final status of the run in MLflow when the block ends: finished, stopped or failed.

    Raise `TrackingError` if MLflow does not answer, and `Interrupted` if the driver was asked to stop.
    """
    try:
        with translated_errors(f"everything that the run has saved is kept: `detr resume {run_id[:8]}` does the rest"):
            yield
    except (KeyboardInterrupt, SystemExit, Interrupted):
        set_final_status(client, run_id, "stopped", "KILLED", say)
        raise Interrupted(
            f"stopped; everything up to the last checkpoint is kept: `detr resume {run_id[:8]}` continues"
        ) from None
    except BaseException:
        set_final_status(client, run_id, "failed", "FAILED", say)
        raise
    set_final_status(client, run_id, "finished", "FINISHED", say)


def _run(config: RunConfig, run_id: str, folder: Path, launch: Launch, accept_change: bool = False) -> None:
    """Run the workers, then send to MLflow what they could not."""
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
        send_left(folder, run_id, tracking_uri(), launch.say)


def _send_unsent(run_id: str, folder: Path, launch: Launch) -> None:
    """Send what a finished run could not send to MLflow while it ran, if there is anything."""
    if anything_left(folder, run_id):
        with only_driver(folder, run_id):
            launch.say("sending what MLflow had not taken when the run ended")
            send_left(folder, run_id, tracking_uri(), launch.say)


def _conclude(client: MlflowClient, config: RunConfig, run_id: str, folder: Path, launch: Launch) -> Outcome:
    """Register the best checkpoint of a trained run."""
    from pipeline.registry.registration import register

    root = checkpoint_root(config.checkpoint.store, folder)
    found = catalog.best(root)
    if found is None:
        raise TrainingError(f"the run ended without an evaluated checkpoint in {root}; expected one at its last step")
    best, metrics = found
    client.set_tag(run_id, TAG_PHASE, "registering")
    left_out = client.get_run(run_id).data.tags.get(TAG_LEFT_OUT)
    if left_out:
        launch.say(f"warning: left out {left_out}")
    registered = register(
        client, run_id, config, best, metrics, name=config.model_name, alias="best", only_if_better=True
    )
    if not registered.alias_moved:
        launch.say(f"models:/{config.model_name}@best stays on another version, whose AP is higher")
    return Outcome(run_id, folder, best, metrics, registered.version, config.model_name, registered.alias_moved)
