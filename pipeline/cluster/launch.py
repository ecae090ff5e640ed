"""Launch of the Ray Train workers: connect to Ray, check its resources, run the workers and watch them.

Ray Train V2 starts, connects and restarts the workers. Every attempt (of Ray after a failure, or of `detr resume`)
enters the same loop, which continues from the newest complete checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location, checkpoint_root
from pipeline.checkpoint.metadata import read_meta
from pipeline.cluster.background_evaluation import evaluator_on_ray
from pipeline.cluster.capacity import alive_nodes, check_this_machine, demand, resources_of_a_worker, wait_for_capacity
from pipeline.cluster.notes.claims import cancel_dead_claims
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.probe import probe
from pipeline.cluster.ray_session import WORKER, Connection, LocalRay, authenticate, lock_local_ray, start_workers_early
from pipeline.cluster.resources import (
    describe_resources,
    report_pending_workers,
    warn_of_sqlite,
)
from pipeline.cluster.startup import printed_timeline
from pipeline.cluster.supervisor import WorkerStatus, supervise
from pipeline.cluster.worker import WorkerJob, train_in_ray
from pipeline.config import ClusterConfig, RunConfig
from pipeline.run_folder import scratch
from pipeline.timeline import mark
from pipeline.tracking.provenance import code_commit
from pipeline.tracking.server.address import refuse_uri_with_secret, tracking_uri, uri_for_workers
from shards.store.retry import fewer_retries

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer


_RESIZE_S = 30.0  # interval of Ray's check for another possible number of workers
_ON_THIS_MACHINE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away with notice
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the controller's looks at its workers delay the end of the run
}


class ConnectedCluster:
    """A Ray cluster that has what the workers of a run need, and every node of which can run them."""

    def __init__(self, local: LocalRay, gpu: bool, say: Callable[[str], None], verbose: bool) -> None:
        self._local, self._say, self._verbose = local, say, verbose
        self.gpu = gpu
        """True if the workers use GPUs."""

    def run(
        self, config: RunConfig, run_id: str, folder: Location, accept_change: bool = False, began: float = 0.0
    ) -> None:
        """Run the workers to the last step, and follow them on stderr.

        With `accept_change` the workers continue even from a checkpoint whose stream of samples is another one. `began` is
        the time at which the run was made. Raise `Interrupted` when a user or a scheduler stopped the run,
        `TrainingError` with the workers' message when it failed.
        """
        gpu, say = self.gpu, self._say
        mark("run created or found")
        from pipeline.cluster.ray_internals import RayNotes, cancel_resource_request, jobs_alive

        notes = Notes.of_run(run_id, RayNotes())
        cancel_dead_claims(notes.store, jobs_alive, cancel_resource_request)
        job = WorkerJob(config, run_id, folder, uri_for_workers(), code_commit(), accept_change, notes, began)
        fit = _trainer(job, gpu, alone=self._local.started).fit
        evaluator = evaluator_on_ray(job, gpu, say) if config.evaluate.asynchronous else None
        if evaluator:
            fit = evaluator.around(fit)
        workers = WorkerStatus(self._local.gone, lambda: _newest_saved_step(config, folder))
        try:
            with ExitStack() as stack:
                stack.enter_context(
                    report_pending_workers(run_id, notes, lambda: describe_resources(config.cluster, gpu))
                )
                if self._verbose:
                    stack.enter_context(printed_timeline(notes, say))
                mark("workers asked for")
                supervise(fit, run_id, notes, say, workers)
        finally:
            if not self._local.gone():
                notes.clear()
        if evaluator:
            evaluator.raise_failure()


@contextmanager
def connecting(config: RunConfig, *, address: str | None, verbose: bool) -> Iterator[Connection]:
    """Begin to join a Ray cluster, or to start one on this machine, and yield at once, for `connected`.

    Ray starts in seconds, most of which are imports of its own. In these the driver imports and checks what it needs.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    tracking_uri()  # moves a login out of the address before processes inherit it
    if address:
        refuse_uri_with_secret()
    _set_environment(config.cluster, address, verbose)  # Ray reads the variables when it is imported
    with _unless_set({} if address else _ON_THIS_MACHINE):
        connection = Connection(config, address, verbose)
        try:
            yield connection
        finally:
            connection.close()


@contextmanager
def connected(
    config: RunConfig, folder: Location, connection: Connection, *, verbose: bool, say: Callable[[str], None]
) -> Iterator[ConnectedCluster]:
    """Yield the cluster of the connection when it can run the workers of `config`; end the connection afterwards.

    Nothing is written for the run here, so that a cluster that cannot run it leaves no trace. `folder` is the run's
    location.
    """
    mark("data checked, initial weights made")
    connection.wait(say)
    mark("Ray answers")
    try:
        if connection.address:
            gpu = _capacity(config.cluster, say)
            start_workers_early(resources_of_a_worker(config.cluster, gpu), config.cluster.workers)
        else:
            gpu = check_this_machine(config.cluster)
        say(_describe_workers(config.cluster, gpu, bool(connection.address)))
        if connection.address:
            probe(config, folder, alive_nodes(), gpu, say)
            mark("nodes probed")
        warn_of_sqlite(say)
        yield ConnectedCluster(connection.local, gpu, say, verbose)
    finally:
        connection.close()


def _capacity(cluster: ClusterConfig, say: Callable[[str], None]) -> bool:
    """Wait for the nodes that the workers need; return True if these use GPUs."""
    from pipeline.cluster.ray_internals import scaling_limits

    with demand() as ask:
        return wait_for_capacity(cluster, say, ask, scaling_limits())


def _set_environment(cluster: ClusterConfig, address: str | None, verbose: bool) -> None:
    """Set the variables that Ray reads when it is imported or started."""
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    if address:
        authenticate()
    else:
        lock_local_ray()
    if not verbose:
        # Less output of Ray itself: the run is followed on stderr anyway.
        os.environ["RAY_TRAIN_ENABLE_PRINT_PATCH"] = "0"
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if cluster.fewest < cluster.workers:
        # Ray notices up to 20 s late that a node has gone, and waits this long for workers that cannot start there.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10")


@contextmanager
def _unless_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set the variables that the environment lacks, inside the block: a later run of this process may join a cluster."""
    lacking = variables.keys() - os.environ.keys()
    os.environ.update({name: variables[name] for name in lacking})
    try:
        yield
    finally:
        for name in lacking:
            os.environ.pop(name, None)


def _describe_workers(cluster: ClusterConfig, gpu: bool, joined: bool) -> str:
    fewest, most = cluster.fewest, cluster.workers
    count = f"{fewest} to {most}" if fewest < most else str(most)
    workers = "worker" if most == 1 else "workers"
    choice = (
        " (no node has a GPU; --cluster.gpu yes waits for them)" if joined and cluster.gpu == "auto" and not gpu else ""
    )
    return f"{count} {workers} on {'GPUs, NCCL' if gpu else 'CPUs, gloo'}{choice}"


def _trainer(job: WorkerJob, gpu: bool, alone: bool) -> TorchTrainer:
    """Return Ray's trainer, whose `fit` runs the workers with `job`, `alone` if their Ray is of this run only."""
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig

    from pipeline.cluster.controller import GroupEndCallback
    from pipeline.cluster.ray_internals import trainer_class

    cluster = job.config.cluster
    return trainer_class(alone=alone)(
        partial(train_in_ray, job),
        scaling_config=ScalingConfig(
            num_workers=(cluster.fewest, cluster.workers) if cluster.fewest < cluster.workers else cluster.workers,
            elastic_resize_monitor_interval_s=_RESIZE_S,
            use_gpu=gpu,
            resources_per_worker=resources_of_a_worker(cluster, gpu),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=cluster.collective_timeout_s),
        run_config=RayRunConfig(
            # A new name each time: Ray's record of an earlier attempt must not end this one at once.
            name=f"attempt-{os.getpid()}-{os.urandom(4).hex()}",
            storage_path=str(scratch(job.run_id) / "ray"),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
            callbacks=[GroupEndCallback(job.notes)],
            worker_runtime_env={"env_vars": WORKER},
        ),
    )


def _newest_saved_step(config: RunConfig, folder: Location) -> int | None:
    with fewer_retries():  # the run is being stopped
        path = catalog.newest(checkpoint_root(config.checkpoint.store, folder))
        return None if path is None else read_meta(path).step
