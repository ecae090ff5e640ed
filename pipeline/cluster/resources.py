"""Report when a run waits for cluster resources: Ray waits silently until all workers get their CPUs and GPUs.

The report is a tag of the run, which the driver's line, `detr runs RUN --follow` and the MLflow UI show.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import attempts
from pipeline.config import ClusterConfig
from pipeline.mlflow_store import connect
from pipeline.stopping import asked_to_yield
from pipeline.track import TAG_WARNING
from shards.errors import one_line

LOG = logging.getLogger(__name__)
TAG_ROOM = f"{TAG_WARNING}.room"
_PATIENCE_S = 90.0  # a group of workers starts in 15 to 60 s, most of which are imports
_LOOK_S = 5.0
_ANSWER_S = 10.0  # for clearing the tag at the end


def room(cluster: ClusterConfig, gpu: bool) -> str:
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
        f"the workers have not started: {workers} need{'s' if fewest == 1 else ''} {needed} in all, and the cluster has {present}; the run continues by "
        "itself when they are free, Ctrl-C ends it"
    )


@contextmanager
def telling_of_waits(run_id: str, folder: Path, why: Callable[[], str]) -> Iterator[None]:
    """Inside the block, set the tag `TAG_ROOM` to `why()` while no workers have been running for a while."""
    done = threading.Event()
    # In a thread: an unreachable store blocks its client for minutes, in which the driver must still handle signals.
    thread = threading.Thread(target=_watch, args=(run_id, folder, why, done), name="waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_ANSWER_S)


def _watch(run_id: str, folder: Path, why: Callable[[], str], done: threading.Event) -> None:
    reported, since, over, warned = "", time.monotonic(), False, False
    while not over:
        over = done.wait(_LOOK_S)
        now = time.monotonic()
        # Workers that are asked to hand over are running until they have saved.
        if over or attempts.at_work(folder) or asked_to_yield(folder):
            since = now
        try:
            text = ""
            if now - since >= _PATIENCE_S:
                text = reported or why()  # not updated during a wait, since the free resources change all the time
            if text != reported:
                connect().set_tag(run_id, TAG_ROOM, text)
                reported = text
            warned = False
        except Exception as error:
            # The report is only information: the run continues if the store or Ray does not answer.
            if not warned:
                LOG.warning("a wait for workers could not be reported: %s", one_line(error))
            warned = True
