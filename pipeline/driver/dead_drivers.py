"""Runs in MLflow whose driver was killed: MLflow calls them running until somebody looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pipeline.checkpoint.location import Location, location
from pipeline.driver.lease import Claims, Watch
from pipeline.driver.record import read_record
from pipeline.errors import PipelineError
from pipeline.tracking.mlflow_runs import set_final_status
from pipeline.tracking.tags import TAG_FOLDER
from shards.errors import ShardError
from shards.store.retry import fewer_retries

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LOOK_S = 1.0
_STATUS = {"finished": "FINISHED", "failed": "FAILED"}


def close_dead_runs(client: MlflowClient, runs: Sequence[Run], warn: Callable[[str], None]) -> bool:
    """Give the runs among these that MLflow calls running, but on which no driver works, their final status.

    Return True if there were any. Only runs whose store can be read from here are judged. A driver on another machine is
    watched for as long as it takes to tell: a few seconds if it is alive.
    """
    watches = {
        str(run.info.run_id): (place, Watch())
        for run in runs
        if run.info.status == "RUNNING" and (place := _place(run)) is not None
    }
    closed = False
    while watches:
        for run_id, (place, watch) in list(watches.items()):
            state = _state(place, watch)
            if state == "":
                continue
            del watches[run_id]
            if state != "alive":
                phase = state if state in _STATUS else "killed"
                closed |= set_final_status(client, run_id, phase, _STATUS.get(state, "KILLED"), warn)
        if watches:
            time.sleep(_LOOK_S)
    return closed


def _place(run: Run) -> Location | None:
    """Return the location of a run if it has a record that can be read here."""
    try:
        with fewer_retries():
            place = location(run.data.tags[TAG_FOLDER])
            return place if read_record(place) else None
    except (OSError, ShardError, PipelineError):
        return None


def _state(place: Location, watch: Watch) -> str:
    """Return "alive" if a driver works on the run, else the status in its record; empty if it is not known yet."""
    try:
        with fewer_retries():
            states = [watch.judge(claim) for claim in Claims(place).read().values()]
            if "alive" in states:
                return "alive"
            record = read_record(place)
    except (OSError, ShardError, PipelineError):
        return "alive"  # not to be judged now
    if "unknown" in states or record is None:
        return ""
    return record.status
