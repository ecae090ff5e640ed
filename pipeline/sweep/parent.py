"""The parent run of a sweep in MLflow: it groups the trials, and keeps which of them was best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.sweep.process import Point
from pipeline.sweep.record import SweepRecord
from pipeline.tracking.mlflow_runs import experiment_id, origin_tags
from pipeline.tracking.tags import TAG_SWEEP, TAG_SWEEP_BEST

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PARENT = "mlflow.parentRunId"
_TABLE = "trials.json"


class ParentRun:
    """The parent run of a sweep, and its trials as MLflow knows them."""

    def __init__(self, client: MlflowClient, run_id: str, record: SweepRecord) -> None:
        self.run_id, self.metric, self._client, self._record = run_id, record.metric, client, record

    def adopt(self, run_id: str, values: Mapping[str, str]) -> None:
        """Make a run a child of this one."""
        shown = ", ".join(f"{name}={value}" for name, value in values.items())
        self._client.set_tag(run_id, _PARENT, self.run_id)
        self._client.set_tag(run_id, TAG_SWEEP, f"{self._record.name}: {shown}" if shown else self._record.name)

    def points(self, run_id: str) -> list[Point]:
        """Return the values of the metric that a trial has reported."""
        history = self._client.get_metric_history(run_id, self._record.metric)
        return [Point(int(point.step), float(point.value)) for point in history]

    def finish(self, best: str, value: float, columns: Mapping[str, Sequence[Any]]) -> None:
        """Keep the best trial and the table of all."""
        self._client.set_tag(self.run_id, TAG_SWEEP_BEST, best)
        self._client.log_metric(self.run_id, self._record.metric, value)
        self._client.log_dict(self.run_id, {name: list(values) for name, values in columns.items()}, _TABLE)

    def set_status(self, status: str) -> None:
        """Set MLflow's status of the sweep: RUNNING, FINISHED, FAILED or KILLED."""
        if status == "RUNNING":
            self._client.update_run(self.run_id, status=status)
        else:
            self._client.set_terminated(self.run_id, status)


def parent_run(client: MlflowClient, config: RunConfig, record: SweepRecord) -> ParentRun:
    """Return the parent run of the sweep; create it for a new one."""
    run_id = record.run_id
    if not run_id:
        tags = {**origin_tags(f"detr sweep {record.name} {record.recipe}"), TAG_SWEEP: record.name}
        made = client.create_run(experiment_id(client, config.track.experiment), run_name=record.name, tags=tags)
        run_id = str(made.info.run_id)
        client.log_param(run_id, "recipe", record.recipe)
        client.log_param(run_id, "metric", record.metric)
    return ParentRun(client, run_id, record)
