"""Writer of a run's description, from what MLflow knows of the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.tracking.mlflow_client import unavailable
from pipeline.tracking.pages.description import Scored, describe
from pipeline.tracking.tags import TAG_NOTE, TAG_PHASE, TAG_WARNING
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOG = logging.getLogger(__name__)
_METRICS = ("PQ", "AP", "AP50", "AP75", "mask_AP", "mask_AP50")
_EPOCH = "evaluation/epoch"
_INTERVAL_S = 60.0


def write_description(client: MlflowClient, run_id: str, config: RunConfig) -> None:
    """Rewrite the description of a run; raise what the client raises."""
    run = client.get_run(run_id)
    found = client.search_model_versions(f"run_id = '{run_id}'")
    versions = [f"{version.name}/{version.version}" for version in sorted(found, key=lambda entry: int(entry.version))]
    client.set_tag(run_id, TAG_NOTE, describe(run, config, _scores(client, run), versions))


class DescriptionWriter:
    """Callback that rewrites the description of a run as it is followed.

    That is when it is evaluated, warns or enters another phase, and after a minute. `read` returns the configuration of
    the run. The description is only information: if it cannot be written, that is logged, and tried again later.
    """

    def __init__(self, client: MlflowClient, read: Callable[[], RunConfig]) -> None:
        self._client, self._read = client, read
        self._config: RunConfig | None = None
        self._seen: object = None
        self._next_s = 0.0

    def __call__(self, run: Run) -> None:
        """Rewrite the description if it is due in this state of the run."""
        tags = run.data.tags
        warnings = {name: text for name, text in tags.items() if name.startswith(TAG_WARNING)}
        state = (run.data.metrics.get(_EPOCH), tags.get(TAG_PHASE, "").partition(" ")[0], warnings)
        if state == self._seen and time.monotonic() < self._next_s:
            return
        self._seen, self._next_s = state, time.monotonic() + _INTERVAL_S
        passing: tuple[type[Exception], ...] = (*unavailable(), PipelineError)
        try:
            self._config = self._config or self._read()
            write_description(self._client, run.info.run_id, self._config)
        except passing as error:
            LOG.info("the description of the run is not up to date (%s)", one_line(error))


def _scores(client: MlflowClient, run: Run) -> list[Scored]:
    """Return the evaluations of a run by step."""
    if _EPOCH not in run.data.metrics:
        return []
    epochs = {point.step: point.value for point in client.get_metric_history(run.info.run_id, _EPOCH)}
    metrics: dict[int, dict[str, float]] = {step: {} for step in epochs}
    for name in _METRICS:
        if f"val/{name}" in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, f"val/{name}"):
                metrics.setdefault(point.step, {})[name] = point.value
    return [Scored(step, epochs.get(step, 0.0), metrics[step]) for step in sorted(metrics)]
