"""The driver of a run: check, create it in MLflow, start Ray Train workers, watch, conclude, register the best.

Ray Train V2 launches, connects and restarts the workers; what is ours is the state they go on from. Every attempt (of
Ray's after a failure, or of `detr resume`) enters `pipeline.worker.run`, which looks for the newest whole checkpoint.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from pipeline import checkpoint
from pipeline.config import RunConfig, from_json, to_json
from pipeline.errors import USER_ERRORS, CheckpointError, RunConfigError, TrainingError
from pipeline.mlflow_store import (
    TAG_EPOCHS,
    TAG_FOLDER,
    TAG_TOTAL_STEPS,
    TAG_TRAIN_DIGEST,
    EventSender,
    code_commit,
    connect,
    create_run,
    find_run,
    read_config,
    tracking_uri,
)
from pipeline.track import TAG_PHASE, SpoolTracker

_FATAL = "fatal.json"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Launch:
    """How to start, as opposed to what: none of it changes the result."""

    address: str | None = None
    """A Ray cluster (`auto`, `HOST:6379` or `ray://...`); by default RAY_ADDRESS, else a local one is started."""
    verbose: bool = False
    say: Say = print


@dataclass(frozen=True)
class Outcome:
    """What a finished run left behind."""

    run_id: str
    folder: Path
    best: Path
    metrics: dict[str, float]
    version: str
    model_name: str


class _Interrupted(TrainingError):
    """Stopped by a person or a scheduler; goes on with `detr resume`."""


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
    (folder / _FATAL).unlink(missing_ok=True)
    try:
        _run_workers(config, run_id, folder, launch)
    except (KeyboardInterrupt, SystemExit, _Interrupted):
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


def _run_workers(config: RunConfig, run_id: str, folder: Path, launch: Launch) -> None:
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    if not launch.verbose:
        # Ray prints its own account of everything; the follower says what matters.
        os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    _connect_ray(ray, config, launch)
    try:
        gpu = _use_gpu(ray, config)
        scaling = ScalingConfig(
            num_workers=config.cluster.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        )
        trainer = TorchTrainer(
            _ray_worker,
            train_loop_config={
                "config": to_json(config).decode(),
                "run_id": run_id,
                "folder": str(folder),
                "tracking_uri": tracking_uri(),
                "code_commit": code_commit(),
            },
            scaling_config=scaling,
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            run_config=RayRunConfig(
                # A name of its own for every attempt: Ray's record of an earlier one must not end this one at once.
                name=f"attempt-{os.getpid()}-{os.urandom(4).hex()}",
                storage_path=str(folder / "ray"),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        _fit_and_follow(trainer, run_id, folder)
    finally:
        ray.shutdown()


def _connect_ray(ray: Any, config: RunConfig, launch: Launch) -> None:
    address = launch.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {} if launch.verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                # A laptop with fewer cores than workers still runs them, more slowly.
                needed = config.cluster.workers * config.cluster.cpus_per_worker
                ray.init(address="local", num_cpus=max(os.cpu_count() or 1, needed), include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            first_line = str(error).splitlines()[0]
            raise TrainingError(
                f"no Ray cluster answers at {address} ({first_line}); expected a running one: check --address"
            ) from None
    if address:
        _check_resources(ray, config)


def _check_resources(ray: Any, config: RunConfig) -> None:
    """A cluster that can never fit the workers would wait for ever."""
    have = ray.cluster_resources()
    need = {"CPU": config.cluster.workers * config.cluster.cpus_per_worker}
    need |= {"GPU": config.cluster.workers} if config.cluster.gpu == "yes" else {}
    for kind, count in need.items():
        if have.get(kind, 0) < count:
            raise RunConfigError(
                f"the cluster has {have.get(kind, 0):g} {kind}s but {config.cluster.workers} workers need {count}; "
                "expected at least as many: lower --cluster.workers or add nodes"
            )


def _use_gpu(ray: Any, config: RunConfig) -> bool:
    """Computed here, because Ray takes any non-empty string for true."""
    if config.cluster.gpu == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) >= config.cluster.workers)
    return config.cluster.gpu == "yes"


def _fit_and_follow(trainer: Any, run_id: str, folder: Path) -> None:
    """Fit in this thread, watch in another. An error that a retry cannot mend ends the fit at once."""
    import _thread

    from pipeline.follow import follow

    stop = threading.Event()
    done = threading.Event()

    def end_if_fatal() -> None:
        if (folder / _FATAL).exists() and not done.is_set():
            done.set()
            _thread.interrupt_main()

    watcher = threading.Thread(
        target=follow,
        args=(connect(), run_id, sys.stderr),
        kwargs={"stop": stop, "each": end_if_fatal},
        name="follow",
        daemon=True,
    )
    watcher.start()
    try:
        trainer.fit()
        done.set()
    except KeyboardInterrupt:
        _raise_fatal(folder)
        raise _Interrupted("interrupted") from None
    except Exception as error:
        done.set()
        _raise_fatal(folder)
        raise TrainingError(_explain(error)) from error
    finally:
        done.set()
        stop.set()
        watcher.join(10)


def _raise_fatal(folder: Path) -> None:
    path = folder / _FATAL
    if path.exists():
        raise TrainingError(msgspec.json.decode(path.read_bytes(), type=dict[str, str])["message"])


def _explain(error: Exception) -> str:
    """The workers' own words, one line: Ray wraps them in its account of the group."""
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or failure
        lines = str(cause).strip().splitlines() or [type(failure).__name__]
        return f"worker {rank} failed: {lines[-1]}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"training failed: {lines[0]}"


def _ray_worker(job: dict[str, str]) -> None:
    """What Ray Train runs in every worker process."""
    import ray.train
    import torch

    from pipeline.parallel import Ranks
    from pipeline.worker import Place, run

    context = ray.train.get_context()
    config = from_json(job["config"])
    folder = Path(job["folder"])
    torch.set_num_threads(config.cluster.cpus_per_worker)
    ranks = Ranks(context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    place = Place(job["run_id"], folder, job["code_commit"])
    tracker = None
    if ranks.first:
        spool = folder / "spool"
        tracker = SpoolTracker(spool, EventSender(job["tracking_uri"], job["run_id"], spool))
        tracker.tags({TAG_PHASE: "training"})
    try:
        run(config, place, ranks, tracker)
    except USER_ERRORS as error:
        # Trying again would fail again: leave word for the driver, which ends the run instead.
        (folder / _FATAL).write_bytes(msgspec.json.encode({"message": str(error)}))
        raise
    finally:
        if tracker:
            tracker.close()
