"""Ray Train workers, started, watched and explained.

Ray Train V2 launches, connects and restarts the workers; what is ours is the state they go on from. Every attempt (of
Ray's after a failure, or of `detr resume`) enters `pipeline.worker.run`, which looks for the newest whole checkpoint.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.asynchronous import evaluator_on_ray
from pipeline.checkpoint_store import home_of
from pipeline.config import RunConfig, to_json
from pipeline.errors import RunConfigError, TrainingError, first_line
from pipeline.fitting import Workers, fit_and_follow
from pipeline.local_ray import LocalRay
from pipeline.mlflow_store import code_commit, tracking_uri
from pipeline.ray_worker import train_in_ray
from pipeline.waiting import room, telling_of_waits
from shards.retry import hurried

_RESIZE_S = 30.0  # between two looks whether the cluster has room for another number of workers


def run_workers(
    config: RunConfig,
    run_id: str,
    folder: Path,
    *,
    address: str | None,
    verbose: bool,
    say: Callable[[str], None],
    accept_change: bool = False,
) -> None:
    """Start or join a Ray cluster, run the workers to the last step, and watch them on stderr.

    With `accept_change` the workers go on from a checkpoint of another stream of samples (`pipeline/identity.py`).
    Raises `Interrupted` when a person or a scheduler stopped it, `TrainingError` in the workers' own words otherwise.
    """
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    address = address or os.environ.get("RAY_ADDRESS")
    if address:
        authenticate()
    else:
        _lock_local_ray()
    if not verbose:
        # Ray prints its own account of everything; the follower says what matters.
        os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if config.cluster.fewest < config.cluster.workers:
        # What Ray knows of the nodes is up to 20 s old: where one is gone, it waits so long for workers that cannot start.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")
    import ray
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.controller import GroupNotes

    local = LocalRay()
    with local.outside_the_group():
        _connect_ray(ray, config, address, verbose)
    workers = Workers(local.gone, lambda: _saved(config, folder))
    try:
        _check_resources(ray, config, address)
        gpu = _use_gpu(ray, config)
        fewest, most = config.cluster.fewest, config.cluster.workers
        count = f"{fewest} to {most}" if fewest < most else f"{most}"
        say(f"{count} worker{'s' * (most > 1)} on {'GPUs, NCCL' if gpu else 'CPUs, gloo'}")
        _warn_of_sqlite(ray, say)
        scaling = ScalingConfig(
            num_workers=(fewest, most) if fewest < most else most,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.cluster.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        )
        job = {
            "config": to_json(config).decode(),
            "run_id": run_id,
            "folder": str(folder),
            "tracking_uri": tracking_uri(),
            "code_commit": code_commit(),
            "accept_change": accept_change,
        }
        trainer = TorchTrainer(
            train_in_ray,
            train_loop_config=job,
            scaling_config=scaling,
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=config.cluster.collective_timeout_s),
            run_config=RayRunConfig(
                # A name of its own for every attempt: Ray's record of an earlier one must not end this one at once.
                name=f"attempt-{os.getpid()}-{os.urandom(4).hex()}",
                storage_path=str(folder / "ray"),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
                callbacks=[GroupNotes(folder)],
            ),
        )
        evaluator = evaluator_on_ray(config, job, gpu, say) if config.evaluate.asynchronous else None
        fit = evaluator.around(trainer.fit) if evaluator else trainer.fit
        brief = nullcontext() if verbose else brief_losses()
        with brief, telling_of_waits(run_id, folder, lambda: room(ray, config.cluster, gpu)):
            fit_and_follow(fit, run_id, folder, say, workers)
        if evaluator:
            evaluator.raise_failure()
    finally:
        ray.shutdown()


def _saved(config: RunConfig, folder: Path) -> int | None:
    with hurried():  # who asks is being stopped
        path = checkpoint.newest(home_of(config.checkpoint.store, folder))
        return None if path is None else checkpoint.read_meta(path).step


def authenticate() -> None:
    """Show this machine's token to a cluster that is about to be contacted; call it before ray is imported.

    `ray start --head` asks for a token by default and writes one, yet clients send it only in mode `token`. A mode
    that was chosen (`RAY_AUTH_MODE`) is respected; a cluster without authentication ignores the token.
    """
    known = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if known or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _lock_local_ray() -> None:
    """Ray's ports are open to the network, and whoever speaks to them may run code: ask for a token of this run's own.

    Ray itself turns the asking on for what it starts, unless `RAY_AUTH_MODE` was chosen. Chosen here, it would bind the
    servers but not this process, where ray was imported before; and without a token Ray would keep one below the home folder.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _connect_ray(ray: Any, config: RunConfig, address: str | None, verbose: bool) -> None:
    quiet: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                # A laptop with fewer cores than workers still runs them, more slowly.
                needed = (config.cluster.workers + config.evaluate.asynchronous) * config.cluster.cpus_per_worker
                # By its loopback address, which a laptop keeps when it changes networks.
                ray.init(
                    address="local",
                    num_cpus=max(os.cpu_count() or 1, needed),
                    include_dashboard=False,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address:
                why = f"no Ray cluster answers at {address} ({first_line(error)}); expected a running one: check --address"
            else:
                why = (
                    f"Ray does not start on this machine ({first_line(error)}); expected its servers to: --verbose shows what "
                    "they say, --address joins a cluster that runs"
                )
            raise TrainingError(why) from None


@contextmanager
def brief_losses() -> Iterator[None]:
    """In the block, Ray tells of a lost node in one line: it adds forty of the node's log, and a run says what it lost."""
    from ray._private import worker

    tell = worker.print_to_stdstream

    def briefly(data: dict[str, Any], ignore_prefix: bool) -> None:
        if data.get("pid") == "raylet":
            data = {**data, "lines": [line.strip().partition("\n")[0].rstrip(": \t")[:250] for line in data["lines"]]}
        tell(data, ignore_prefix)

    worker.print_to_stdstream = briefly
    try:
        yield
    finally:
        worker.print_to_stdstream = tell


def _check_resources(ray: Any, config: RunConfig, address: str | None) -> None:
    """A cluster that can never fit the workers would wait for ever. One that was started here has CPUs as asked for."""
    have = ray.cluster_resources()
    fewest, gpus, cpus = config.cluster.fewest, int(have.get("GPU", 0)), int(have.get("CPU", 0))
    flag = "--cluster.min-workers" if config.cluster.min_workers else "--cluster.workers"
    if config.cluster.gpu == "yes" and gpus < fewest:
        raise RunConfigError(
            f"{'the cluster' if address else 'this machine'} has {gpus} GPUs but {fewest} workers need one each; expected as "
            f"many: name {'another' if address else 'a'} cluster with --address, lower {flag}, or train on CPUs with "
            "--cluster.gpu no, or try two small steps with --smoke"
        )
    needed = fewest * config.cluster.cpus_per_worker
    if address and cpus < needed:
        raise RunConfigError(
            f"the cluster has {cpus} CPUs but {fewest} workers need {needed}; expected at least as many: lower {flag} or add "
            "nodes"
        )


def _use_gpu(ray: Any, config: RunConfig) -> bool:
    """Computed here, because Ray takes any non-empty string for true."""
    if config.cluster.gpu != "auto":
        return config.cluster.gpu == "yes"
    gpus = int(ray.cluster_resources().get("GPU", 0))
    fewest = config.cluster.fewest
    if 0 < gpus < fewest:
        flag = "--cluster.min-workers" if config.cluster.min_workers else "--cluster.workers"
        raise RunConfigError(
            f"the cluster has {gpus} GPUs for {fewest} workers; expected one each: "
            f"{flag} {gpus} (the batch stays the same), or --cluster.gpu no"
        )
    return gpus > 0


def _warn_of_sqlite(ray: Any, say: Callable[[str], None]) -> None:
    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) > 1 and tracking_uri().startswith("sqlite:"):
        say(
            f"warning: the tracking store is a file on this machine, but the cluster has {len(hosts)} hosts; workers "
            "elsewhere cannot write it: set MLFLOW_TRACKING_URI to a server"
        )
