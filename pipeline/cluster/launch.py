"""Launch of the Ray Train workers: connect to Ray, check its resources, run the workers and watch them.

Ray Train V2 starts, connects and restarts the workers. Every attempt (of Ray after a failure, or of `detr resume`)
enters the same loop, which continues from the newest complete checkpoint.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import checkpoint
from pipeline.asynchronous import evaluator_on_ray
from pipeline.checkpoint_store import home_of
from pipeline.config import ClusterConfig, RunConfig
from pipeline.errors import PipelineError, RunConfigError, TrainingError
from pipeline.fitting import Workers, fit_and_follow
from pipeline.local_ray import LocalRay, join_cluster, quiet_options
from pipeline.mlflow_store import code_commit, tracking_uri
from pipeline.ray_worker import WorkerJob, train_in_ray
from pipeline.waiting import room, telling_of_waits
from shards.errors import one_line
from shards.retry import hurried

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

_RESIZE_S = 30.0  # interval of Ray's check for another possible number of workers


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
    """Start or join a Ray cluster, run the workers to the last step, and follow them on stderr.

    With `accept_change` the workers continue even from a checkpoint whose stream of samples is another one. Raise
    `Interrupted` when a user or a scheduler stopped the run, `TrainingError` with the workers' message when it failed.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    _set_environment(config.cluster, address, verbose)
    import ray  # reads the environment

    local = LocalRay()
    with local.outside_the_group():
        _connect_ray(config, address, verbose)
    try:
        _check_resources(config, address)
        gpu = _use_gpu(config)
        say(_describe_workers(config.cluster, gpu))
        _warn_of_sqlite(say)
        job = WorkerJob(config, run_id, folder, tracking_uri(), code_commit(), accept_change)
        fit = _trainer(job, gpu).fit
        evaluator = evaluator_on_ray(job, gpu, say) if config.evaluate.asynchronous else None
        if evaluator:
            fit = evaluator.around(fit)
        workers = Workers(local.gone, lambda: _newest_saved_step(config, folder))
        with telling_of_waits(run_id, folder, lambda: room(config.cluster, gpu)):
            fit_and_follow(fit, run_id, folder, say, workers)
        if evaluator:
            evaluator.raise_failure()
    finally:
        ray.shutdown()


def _set_environment(cluster: ClusterConfig, address: str | None, verbose: bool) -> None:
    """Set the variables that Ray reads when it is imported or started."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    if address:
        authenticate()
    else:
        _lock_local_ray()
    if not verbose:
        # Less output of Ray itself: the run is followed on stderr anyway.
        os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if cluster.fewest < cluster.workers:
        # Ray notices up to 20 s late that a node has gone, and waits this long for workers that cannot start there.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")


def _describe_workers(cluster: ClusterConfig, gpu: bool) -> str:
    fewest, most = cluster.fewest, cluster.workers
    count = f"{fewest} to {most}" if fewest < most else str(most)
    workers = "worker" if most == 1 else "workers"
    return f"{count} {workers} on {'GPUs, NCCL' if gpu else 'CPUs, gloo'}"


def _trainer(job: WorkerJob, gpu: bool) -> TorchTrainer:
    """Return Ray's trainer, whose `fit` runs the workers with `job`."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.controller import GroupNotes

    cluster = job.config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if gpu:
        resources["GPU"] = 1
    return TorchTrainer(
        partial(train_in_ray, job),
        scaling_config=ScalingConfig(
            num_workers=(cluster.fewest, cluster.workers) if cluster.fewest < cluster.workers else cluster.workers,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            use_gpu=gpu,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=cluster.collective_timeout_s),
        run_config=RayRunConfig(
            # A new name each time: Ray's record of an earlier attempt must not end this one at once.
            name=f"attempt-{os.getpid()}-{os.urandom(4).hex()}",
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[GroupNotes(job.folder)],
        ),
    )


def _newest_saved_step(config: RunConfig, folder: Path) -> int | None:
    with hurried():  # the run is being stopped
        path = checkpoint.newest(home_of(config.checkpoint.store, folder))
        return None if path is None else checkpoint.read_meta(path).step


def authenticate() -> None:
    """Make Ray send this machine's token to the cluster that it joins; call this before ray is imported.

    `ray start --head` requires a token by default and writes one, yet clients send it only in mode `token`. A chosen
    mode (`RAY_AUTH_MODE`) is respected; a cluster without authentication ignores the token.
    """
    known = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if known or (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _lock_local_ray() -> None:
    """Protect the Ray that is started here with a token: its ports are open to the network and accept code to run.

    Ray turns authentication on for servers that it starts, unless `RAY_AUTH_MODE` is set. It is not set here, since it
    would apply to the servers but not to this process if ray was imported before. Without a token of this run, Ray
    would write one to the home folder.
    """
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _connect_ray(config: RunConfig, address: str | None, verbose: bool) -> None:
    if address:
        try:
            join_cluster(address, verbose)
        except PipelineError as error:
            raise TrainingError(str(error)) from None
    else:
        _start_ray(config, verbose)


def _start_ray(config: RunConfig, verbose: bool) -> None:
    import ray

    # A laptop with fewer cores than workers still runs them, more slowly.
    needed = (config.cluster.workers + config.evaluate.asynchronous) * config.cluster.cpus_per_worker
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, needed),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",  # a laptop keeps it when it changes networks
                **quiet_options(verbose),
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"Ray does not start on this machine ({one_line(error)}); expected its servers to: --verbose shows their output, "
            "--address joins a running cluster"
        ) from None


def _check_resources(config: RunConfig, address: str | None) -> None:
    """Raise `RunConfigError` when the cluster can never fit the workers, which would wait for ever.

    A Ray that was started here has as many CPUs as were requested.
    """
    import ray

    have = ray.cluster_resources()
    fewest, gpus, cpus = config.cluster.fewest, int(have.get("GPU", 0)), int(have.get("CPU", 0))
    flag = "--cluster.min-workers" if config.cluster.min_workers else "--cluster.workers"
    if config.cluster.gpu == "yes" and gpus < fewest:
        raise RunConfigError(
            f"{'the cluster' if address else 'this machine'} has {gpus} GPUs but {fewest} workers need one each; expected as "
            f"many: join {'another' if address else 'a'} cluster with --address, lower {flag}, or train on CPUs with "
            "--cluster.gpu no, or try two small steps with --smoke"
        )
    needed = fewest * config.cluster.cpus_per_worker
    if address and cpus < needed:
        raise RunConfigError(
            f"the cluster has {cpus} CPUs but {fewest} workers need {needed}; expected at least as many: lower {flag} or add "
            "nodes"
        )


def _use_gpu(config: RunConfig) -> bool:
    """Return True if the workers use GPUs; raise `RunConfigError` when "auto" finds too few of them."""
    import ray

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


def _warn_of_sqlite(say: Callable[[str], None]) -> None:
    import ray

    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) > 1 and tracking_uri().startswith("sqlite:"):
        say(
            f"warning: the tracking store is a file on this machine, but the cluster has {len(hosts)} hosts; workers "
            "elsewhere cannot write it: set MLFLOW_TRACKING_URI to a server"
        )
