"""Report when a run waits for cluster resources: Ray waits silently until all workers get their CPUs and GPUs.

The report is a tag of the run, which the driver's line, `detr runs RUN --follow` and the MLflow UI show.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.cluster import attempts
from pipeline.cluster.notes import Notes
from pipeline.config import ClusterConfig, RunConfig
from pipeline.errors import RunConfigError
from pipeline.tracking.mlflow_client import connect, tracking_uri
from pipeline.tracking.tags import TAG_PENDING_WORKERS
from shards.errors import one_line

LOG = logging.getLogger(__name__)
_PATIENCE_S = 90.0  # a group of workers starts in 15 to 60 s, most of which are imports
_ANSWER_S = 10.0  # for clearing the tag at the end


def describe_resources(cluster: ClusterConfig, gpu: bool) -> str:
    """Return one line about the resources that the workers need and those that the connected Ray cluster has."""
    import ray

    each = {"CPU": cluster.cpus_per_worker}
    if gpu:
        each["GPU"] = 1
    have, free = ray.cluster_resources(), ray.available_resources()
    fewest = cluster.fewest
    needed = " and ".join(f"{fewest * count} {kind}" for kind, count in each.items())
    present = " and ".join(f"{have.get(kind, 0):g} {kind} ({free.get(kind, 0):g} free)" for kind in each)
    workers = f"{fewest} {'worker' if fewest == 1 else 'workers'}"
    if fewest < cluster.workers:
        workers = f"at least {workers}"
    return (
        f"the workers have not started: {workers} need{'s' if fewest == 1 else ''} {needed} in all, and the cluster "
        f"has {present}; the run continues by itself when they are free, Ctrl-C ends it"
    )


@contextmanager
def report_pending_workers(
    run_id: str, notes: Notes, why: Callable[[], str], patience_s: float = _PATIENCE_S, look_s: float = 5.0
) -> Iterator[None]:
    """Inside the block, set `TAG_PENDING_WORKERS` to `why()` when no worker has run for `patience_s` seconds."""
    done = threading.Event()
    # In a thread: an unreachable store blocks its client for minutes, in which the driver must still handle signals.
    thread = threading.Thread(
        target=_watch, args=(run_id, notes, why, patience_s, look_s, done), name="waits", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_ANSWER_S)


def _watch(
    run_id: str, notes: Notes, why: Callable[[], str], patience_s: float, look_s: float, done: threading.Event
) -> None:
    reported, since, over, warned = "", time.monotonic(), False, False
    while not over:
        over = done.wait(look_s)
        now = time.monotonic()
        if over or attempts.is_running(notes):
            since = now
        try:
            text = ""
            if now - since >= patience_s:
                text = reported or why()  # not updated during a wait, since the free resources change all the time
            if text != reported:
                connect().set_tag(run_id, TAG_PENDING_WORKERS, text)
                reported = text
            warned = False
        except Exception as error:
            # The report is only information: the run continues if the store or Ray does not answer.
            if not warned:
                LOG.warning("a wait for workers could not be reported: %s", one_line(error))
            warned = True


def check_resources(config: RunConfig, address: str | None) -> None:
    """Raise `RunConfigError` when the cluster can never fit the workers, which would wait for ever.

    A Ray that was started here has as many CPUs as were requested.
    """
    import ray

    have = ray.cluster_resources()
    fewest, gpus, cpus = config.cluster.fewest, int(have.get("GPU", 0)), int(have.get("CPU", 0))
    flag = "--cluster.min-workers" if config.cluster.min_workers else "--cluster.workers"
    if config.cluster.gpu == "yes" and gpus < fewest:
        raise RunConfigError(
            f"{'the cluster' if address else 'this machine'} has {gpus} GPUs but {fewest} workers need one each; "
            f"expected as many: join {'another' if address else 'a'} cluster with --address, lower {flag}, or train on "
            "CPUs with --cluster.gpu no, or try two small steps with --smoke"
        )
    needed = fewest * config.cluster.cpus_per_worker
    if address and cpus < needed:
        raise RunConfigError(
            f"the cluster has {cpus} CPUs but {fewest} workers need {needed}; expected at least as many: lower {flag} "
            "or add nodes"
        )


def use_gpu(config: RunConfig) -> bool:
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


def warn_of_sqlite(say: Callable[[str], None]) -> None:
    import ray

    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) > 1 and tracking_uri().startswith("sqlite:"):
        say(
            f"warning: the tracking store is a file on this machine, but the cluster has {len(hosts)} hosts; workers "
            "elsewhere cannot write it: set MLFLOW_TRACKING_URI to a server"
        )
