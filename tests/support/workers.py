"""A stand-in for the workers of a run, in the test's process and without Ray, and what MLflow says of its runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.checkpoint.location import Location
from pipeline.config import RunConfig
from pipeline.driver import work
from pipeline.tracking.mlflow_client import connect


def stand_in(patch: pytest.MonkeyPatch, run_workers: Callable[..., None]) -> None:
    """Let `run_workers(config, run_id, folder, accept_change=...)` stand for the workers on a cluster."""

    def run(config: RunConfig, run_id: str, folder: Location, *, accept_change: bool, **_: object) -> None:
        run_workers(config, run_id, folder, accept_change=accept_change)

    @contextmanager
    def connected(*_: object, **__: object) -> Iterator[Any]:
        yield SimpleNamespace(gpu=False, run=run)

    patch.setattr(work, "connecting", lambda *_, **__: nullcontext(SimpleNamespace(address=None)))
    patch.setattr(work, "connected", connected)


def runs_in_mlflow() -> list[str]:
    """Return the status of every run, whatever its tags."""
    client = connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run.info.status for run in client.search_runs(experiments)]
