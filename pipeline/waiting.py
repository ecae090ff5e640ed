"""Tells when a run waits for room in the cluster: Ray waits without a word until all of a run's workers find their CPUs and GPUs.

It is told in the store, where the driver's line, `detr runs RUN --follow` and the MLflow UI take it from.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import attempts
from pipeline.config import ClusterConfig
from pipeline.errors import first_line
from pipeline.mlflow_store import connect
from pipeline.stopping import asked_to_yield
from pipeline.track import TAG_WARNING

LOG = logging.getLogger(__name__)
TAG_ROOM = f"{TAG_WARNING}.room"
_PATIENCE_S = 90.0  # a group of workers starts in 15 to 60 s, most of which are imports
_LOOK_S = 5.0
_ANSWER_S = 10.0  # for the last word, at the end


def room(ray: Any, cluster: ClusterConfig, gpu: bool) -> str:
    """What the workers need of the cluster that `ray` is connected to, and what it has."""
    each = {"CPU": cluster.cpus_per_worker} | ({"GPU": 1} if gpu else {})
    have, free = ray.cluster_resources(), ray.available_resources()
    fewest = cluster.fewest
    needed = " and ".join(f"{fewest * count} {kind}" for kind, count in each.items())
    there = " and ".join(f"{have.get(kind, 0):g} {kind} ({free.get(kind, 0):g} free)" for kind in each)
    wanted = f"{'at least ' if fewest < cluster.workers else ''}{fewest} {'worker' if fewest == 1 else 'workers'}"
    return (
        f"the workers have not begun: wanted is room for {wanted}, {needed} in all, and the cluster has {there}; the run goes on "
        "by itself when there is, Ctrl-C ends it"
    )


@contextmanager
def telling_of_waits(run_id: str, folder: Path, why: Callable[[], str]) -> Iterator[None]:
    """While the block runs, tell in the store when no workers have been at work for a while, and `why`."""
    done = threading.Event()
    # In a thread: a store that is away keeps its client for minutes, and must not keep the driver from hearing signals.
    thread = threading.Thread(target=_watch, args=(run_id, folder, why, done), name="waits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(_ANSWER_S)


def _watch(run_id: str, folder: Path, why: Callable[[], str], done: threading.Event) -> None:
    told, since, over, warned = "", time.monotonic(), False, False
    while not over:
        over = done.wait(_LOOK_S)
        now = time.monotonic()
        # Workers that are to make room for another number of them are at work until they have saved.
        if over or attempts.at_work(folder) or asked_to_yield(folder):
            since = now
        try:
            # Once for each wait: what is free changes all the time.
            text = (told or why()) if now - since >= _PATIENCE_S else ""
            if text != told:
                connect().set_tag(run_id, TAG_ROOM, text)
                told = text
            warned = False
        except Exception as error:
            # It is news for people: neither a store nor a Ray that does not answer may end a run for it.
            if not warned:
                LOG.warning("no word of a wait for workers: %s", first_line(error))
            warned = True
