"""Ray Tune as the scheduler of trials: how many at a time, and which of them end early."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pipeline.cluster.ray_session import LocalRay, authenticate, join_cluster, lock_local_ray, start_local_ray
from pipeline.config import RunConfig

EarlyStop = Literal["none", "asha"]


@dataclass(frozen=True)
class Tuning:
    """Schedule of trials: how many at a time, and which end early."""

    metric: str
    mode: Literal["max", "min"]
    early_stop: EarlyStop
    grace_epochs: int
    """Epochs before which no trial ends early."""
    reduction: float
    """At each rung, the best trials of this share (1 / reduction) continue."""
    parallel: int
    """Trials at a time; 0: as many as fit."""


@contextmanager
def ray_for_trials(config: RunConfig, address: str | None, *, verbose: bool) -> Iterator[str]:
    """Join the Ray cluster, or start one on this machine, and yield its address for the drivers of the trials."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the sweep stops its trials itself
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other output is silent where it is asked to be
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    authenticate() if address else lock_local_ray()
    import ray

    local = LocalRay()
    try:
        with local.outside_the_group():
            join_cluster(address, verbose) if address else start_local_ray(config, verbose)
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()
        local.kill()


def fitting_trials(config: RunConfig) -> int:
    """Return how many trials the cluster that this process has joined can run at a time, at least one."""
    import ray

    has, cluster = ray.cluster_resources(), config.cluster
    by_cpu = has.get("CPU", 0) // (cluster.workers * cluster.cpus_per_worker)
    uses_gpus = cluster.gpu == "yes" or (cluster.gpu == "auto" and has.get("GPU", 0) > 0)
    by_gpu = has.get("GPU", 0) // cluster.workers if uses_gpus else by_cpu
    return max(int(min(by_cpu, by_gpu)), 1)


def tune_trials(
    epochs_per_step: Mapping[str, float], scratch: Path, tuning: Tuning, *, epochs: float, keeper: Any, verbose: bool
) -> None:
    """Let Ray Tune schedule the trials; `keeper`, a `ray.tune.Callback`, starts and stops their processes.

    epochs_per_step: of each trial, by its name. epochs: those of the longest trial.
    """
    from ray import tune

    from pipeline.sweep.watch import watch

    if not verbose:
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    trainable = partial(watch, folder=str(scratch), metric=tuning.metric, epochs_per_step=dict(epochs_per_step))
    tuner = tune.Tuner(
        tune.with_resources(_named(trainable), {_this_node(): 0.001}),
        param_space={"trial": tune.grid_search(list(epochs_per_step))},
        tune_config=tune.TuneConfig(
            metric=tuning.metric,
            mode=tuning.mode,
            scheduler=scheduler(tuning, epochs),
            max_concurrent_trials=tuning.parallel,
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=str(scratch), callbacks=[keeper], verbose=3 if verbose else 0
        ),
    )
    tuner.fit()


def scheduler(tuning: Tuning, epochs: float) -> Any:
    """Return Ray Tune's scheduler. The last epoch is beyond its end, since a trial there has only to be finished."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if tuning.early_stop == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr="epoch",
        max_t=max(int(epochs) + 1, tuning.grace_epochs),
        grace_period=tuning.grace_epochs,
        reduction_factor=tuning.reduction,
    )


def _named(function: Callable[..., None]) -> Callable[[dict[str, str]], None]:
    """Return a function of one argument, which is what Ray Tune takes."""

    def trial(config: dict[str, str]) -> None:
        function(config)

    return trial


def _this_node() -> str:
    """Return the resource of this node, which keeps a trial's actor where its process is and takes no CPU."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    resources: dict[str, float] = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    return next(name for name in resources if name.startswith("node:") and not name.startswith("node:__"))
