"""The driver of a run: check it, create it in MLflow, run its workers, conclude, register the best checkpoint.

A run is created once; every attempt at it (`detr resume` after whatever stopped it) goes through `_see_through`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import checkpoint
from pipeline.config import RunConfig, from_json, to_json
from pipeline.errors import CheckpointError, RunConfigError, TrainingError
from pipeline.launch import Interrupted, run_workers
from pipeline.mlflow_store import (
    CONFIG_ARTIFACT,
    TAG_EPOCHS,
    TAG_FOLDER,
    TAG_TOTAL_STEPS,
    TAG_TRAIN_DIGEST,
    connect,
    create_run,
    find_run,
    read_config,
)
from pipeline.track import TAG_PHASE

Say = Callable[[str], None]


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


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind."""

    run_id: str
    folder: Path
    best: Path
    metrics: dict[str, float]
    version: str
    model_name: str


def train(config: RunConfig, launch: Launch | None = None) -> Outcome:
    """Start a new run and see it through. Everything that can be wrong is checked before Ray starts."""
    from pipeline.preflight import prepare

    launch = launch or Launch()
    client = connect()
    config, ready = prepare(config, launch.say)
    total = ready.schedule.total_steps
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
    folder = Path(config.storage).absolute() / f"{config.run_name}-{run_id[:8]}"
    ready.place(folder)
    client.set_tag(run_id, TAG_FOLDER, str(folder))
    launch.say(f"run {config.run_name} ({run_id[:8]}): {total} steps, checkpoints in {folder / 'checkpoints'}")
    return _see_through(config, run_id, folder, launch)


def resume(name: str, *, epochs: int | None = None, launch: Launch | None = None) -> Outcome:
    """Go on with a run, by id, name or registered version, from its newest checkpoint; `epochs` makes it longer."""
    from pipeline.registry import run_of

    launch = launch or Launch()
    client = connect()
    run = find_run(client, run_of(client, name) if name.startswith("models:/") else name)
    run_id = str(run.info.run_id)
    config = from_json(read_config(client, run_id))
    if epochs is not None:
        config = _lengthen(config, epochs)
        # Parameters of a run cannot change; the artifact is what the next resume reads.
        client.log_text(run_id, to_json(config).decode(), CONFIG_ARTIFACT)
    folder = Path(run.data.tags[TAG_FOLDER])
    newest = checkpoint.newest(folder)
    if newest is None and not (folder / "initial.safetensors").exists():
        raise CheckpointError(f"{folder} holds no checkpoint of run {name}; expected one: is its storage mounted here?")
    from pipeline.optim import Schedule
    from shards.manifest import load_manifest

    schedule = Schedule(config.optim, load_manifest(config.data.train).images)
    step = checkpoint.read_meta(newest).step if newest else 0
    launch.say(f"run {run.info.run_name} ({run_id[:8]}) goes on at step {step} of {schedule.total_steps}")
    client.set_tag(run_id, TAG_TOTAL_STEPS, str(schedule.total_steps))
    client.set_tag(run_id, TAG_EPOCHS, str(schedule.epoch(schedule.total_steps)))
    client.set_tag(run_id, TAG_PHASE, "starting")
    client.update_run(run_id, status="RUNNING")
    return _see_through(config, run_id, folder, launch)


def _lengthen(config: RunConfig, epochs: int) -> RunConfig:
    if epochs < config.optim.epochs:
        raise RunConfigError(
            f"--epochs {epochs} is less than the run's {config.optim.epochs}; expected as many or more: "
            "start a new run for a shorter schedule"
        )
    return replace(config, optim=replace(config.optim, epochs=epochs, max_steps=0))


def _see_through(config: RunConfig, run_id: str, folder: Path, launch: Launch) -> Outcome:
    """Run the workers, set the run's final status, register the best checkpoint."""
    from pipeline.registry import register

    client = connect()
    try:
        run_workers(config, run_id, folder, address=launch.address, verbose=launch.verbose)
    except (KeyboardInterrupt, SystemExit, Interrupted):
        client.set_tag(run_id, TAG_PHASE, "stopped")
        client.set_terminated(run_id, "KILLED")
        raise TrainingError(
            f"stopped; everything up to the last checkpoint is kept: `detr resume {run_id[:8]}` goes on"
        ) from None
    except BaseException:
        client.set_tag(run_id, TAG_PHASE, "failed")
        client.set_terminated(run_id, "FAILED")
        raise
    found = checkpoint.best(folder)
    if found is None:
        raise TrainingError(f"the run ended without an evaluated checkpoint in {folder}; expected one at its last step")
    best, metrics = found
    client.set_tag(run_id, TAG_PHASE, "registering")
    version = register(client, run_id, config, best, metrics, name=config.model_name, alias="best")
    client.set_tag(run_id, TAG_PHASE, "finished")
    client.set_terminated(run_id, "FINISHED")
    return Outcome(run_id, folder, best, metrics, version, config.model_name)
