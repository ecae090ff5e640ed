"""Shards written by a Ray cluster: each one a task, on whichever node has a CPU to spare."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pipeline.errors import PipelineError, first_line
from shards.errors import ShardError
from shards.write import Map

P = TypeVar("P")
R = TypeVar("R")
_AHEAD = 2  # parts per CPU of the cluster that wait or are under way


@contextmanager
def cluster_map(address: str | None, verbose: bool = False) -> Iterator[Map | None]:
    """What ``write_coco`` takes to run on the Ray cluster at ``address`` (``HOST:6379``, ``ray://HOST:10001`` or ``auto``,
    the cluster that a job runs on); None without an address.

    Every node needs this package, and must see images and ``out``. Raises PipelineError where no cluster answers.
    """
    if address is None:
        yield None
        return
    from pipeline.launch import authenticate  # which imports MLflow: seconds that writing here does not need

    authenticate()
    if not verbose:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    quiet: dict[str, Any] = {} if verbose else {"log_to_driver": False, "logging_level": "ERROR"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PipelineError(
                f"no Ray cluster answers at {address} ({first_line(error)}); expected a running one: check --address"
            ) from None
    try:
        yield _map
    finally:
        ray.shutdown()


def _map(function: Callable[[P], R], parts: Iterable[P]) -> Iterator[R]:
    """Results in the order of ``parts``, few of which exist at once."""
    import ray

    @ray.remote(num_cpus=1)  # type: ignore[untyped-decorator]
    def task(part: P) -> R:
        return function(part)

    window = _AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    try:
        for part in parts:
            if len(waiting) == window:
                yield _result(waiting.popleft())
            waiting.append(task.remote(part))
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _result(reference: Any) -> Any:
    """The task's result, or its error in its own words."""
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
            f"a worker of the cluster was lost ({first_line(error)}); finished shards are kept: run the same command again"
        ) from None
