"""Parallel map over the tasks of a Ray cluster, with which shards are written on all nodes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipeline.cluster.ray_session import authenticate, join_cluster
from shards.errors import ShardError, one_line
from shards.write.writer import Map

P = TypeVar("P")
R = TypeVar("R")
_AHEAD = 2  # submitted shard jobs per CPU of the cluster


@contextmanager
def cluster_map(address: str | None, verbose: bool = False) -> Iterator[Map | None]:
    """Yield a map for `write_coco` that runs on a Ray cluster, or None without an address.

    `address` is `HOST:6379`, `ray://HOST:10001`, or `auto` for the cluster that a job runs on. Every node needs this
    package and must see the images and the output folder. Raise `PipelineError` when no cluster answers.
    """
    if address is None:
        yield None
        return
    authenticate()
    if not verbose:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    join_cluster(address, verbose)
    try:
        yield _map
    finally:
        ray.shutdown()


def _map(function: Callable[[P], R], jobs: Iterable[P]) -> Iterator[R]:
    """Yield the results in the order of `jobs`, which are taken from the iterable only as workers become free."""
    import ray

    @ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
    def task(job: P) -> R:
        return function(job)

    window = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    pending: deque[Any] = deque()
    try:
        for job in jobs:
            if len(pending) == window:
                yield _result(pending.popleft())
            pending.append(task.remote(job))
        while pending:
            yield _result(pending.popleft())
    finally:
        for reference in pending:
            ray.cancel(reference)


def _result(reference: Any) -> Any:
    """Return the result of a task; raise its `ShardError` or `OSError` as it was."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, (ShardError, OSError)):
            raise error.cause from None
        raise
    except RayError as error:
        raise ShardError(
            f"a worker of the cluster was lost ({one_line(error)}); finished shards are kept: run the same command "
            "again"
        ) from None
