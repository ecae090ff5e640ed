"""Report when a run waits for cluster resources: Ray waits silently until all workers get their CPUs and GPUs.

The report is a tag of the run, which the driver's line, `detr runs RUN --follow` and the MLflow UI show.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.cluster.capacity import resources_of_a_worker
from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.notes import Notes
from pipeline.config import ClusterConfig
from pipeline.tracking.mlflow_client import connect, tracking_uri
from pipeline.tracking.pages.listed import write_tags
from pipeline.tracking.tags import TAG_PENDING_WORKERS
from shards.errors import one_line

LOG = logging.getLogger(__name__)
_PATIENCE_S = 90.0  # a group of workers starts in 15 to 60 s, most of which are imports
_ANSWER_S = 10.0  # for clearing the tag at the end


def describe_resources(cluster: ClusterConfig, gpu: bool) -> str:
    """Return one line about the resources that the workers need and those that the connected Ray cluster has."""
    import ray

    each = resources_of_a_worker(cluster, gpu)
    have, free = ray.cluster_resources(), ray.available_resources()
    fewest = cluster.fewest
    needed = " and ".join(f"{fewest * count:g} {kind}" for kind, count in each.items())
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
        if over or attempts.is_running(notes) is not False:
            since = now
        try:
            text = ""
            if now - since >= patience_s:
                text = reported or why()  # not updated during a wait, since the free resources change all the time
            if text != reported:
                write_tags(connect(), run_id, {TAG_PENDING_WORKERS: text})
                reported = text
            warned = False
        except Exception as error:
            # The report is only information: the run continues if the store or Ray does not answer.
            if not warned:
                LOG.warning("a wait for workers could not be reported: %s", one_line(error))
            warned = True


def warn_of_sqlite(say: Callable[[str], None]) -> None:
    import ray

    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    if len(hosts) > 1 and tracking_uri().startswith("sqlite:"):
        say(
            f"warning: the tracking store is a file on this machine, but the cluster has {len(hosts)} hosts; workers "
            "elsewhere cannot write it: set MLFLOW_TRACKING_URI to a server"
        )
