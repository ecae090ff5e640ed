"""Points, pictures and checkpoints that a run in MLflow has already.

A spool on another node does not know what the last one has sent, and points that are computed again have other times,
so that MLflow would keep both. Each question is asked once, when its answer is first needed.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from pipeline.tracking.tracker import ATTEMPT_FAMILIES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric

CHECKPOINT = "checkpoint"
"""Type of the models that stand for checkpoints; a registered version has the tag of its checkpoint, too."""
_IMAGES = "images"  # folder of `MlflowClient.log_image`, which names files KEY+step+STEP+timestamp+...


class Reported:
    """Content of a run in MLflow, as it was when it was first asked for.

    Points of a curve are sent in the order of their steps, so those up to the last one are there. With `any_order` each
    is looked up.
    """

    def __init__(self, client: MlflowClient, run_id: str, any_order: bool = False) -> None:
        self._client, self._run_id, self._any_order = client, run_id, any_order
        self._steps: dict[str, set[int]] = {}

    def has_point(self, key: str, step: int) -> bool:
        """Return whether the curve `key` has a point at `step`."""
        if key.split("/")[0] in ATTEMPT_FAMILIES:
            return False
        if step > self._last_steps.get(key, -1):
            return False
        if not self._any_order:
            return True
        if key not in self._steps:
            self._steps[key] = {point.step for point in self._client.get_metric_history(self._run_id, key)}
        return step in self._steps[key]

    def point(self, key: str, step: int) -> Metric | None:
        """Return the point of a curve at `step` as it is now; for curves with few points."""
        points = self._client.get_metric_history(self._run_id, key)
        return next((point for point in points if point.step == step), None)

    def has_picture(self, key: str, step: int) -> bool:
        """Return whether the series `key` has a picture at `step`."""
        return (key, step) in self._pictures

    @property
    def last_evaluated(self) -> int:
        """Highest step whose checkpoint has metrics."""
        return max((step for key, step in self._last_steps.items() if key.startswith("val/")), default=-1)

    def checkpoint(self, experiment_id: str, uri: str, step: int) -> LoggedModel | None:
        """Return the model of a checkpoint as it is now."""
        found = self._client.search_logged_models(
            [experiment_id],
            filter_string=f"source_run_id = '{self._run_id}' AND tags.step = '{step}'",
        )
        models = (model for model in found if model.model_type == CHECKPOINT)
        return next((model for model in models if model.tags.get("checkpoint_uri") == uri), None)

    @cached_property
    def _last_steps(self) -> dict[str, int]:
        run = self._client.get_run(self._run_id)
        return {point.key: point.step for point in run.data.to_proto().metrics}  # the data alone has no steps

    @cached_property
    def _pictures(self) -> set[tuple[str, int]]:
        # The small copy is uploaded last.
        names = [file.path.rpartition("/")[2] for file in self._client.list_artifacts(self._run_id, _IMAGES)]
        fields = [name.split("+") for name in names if name.endswith("+compressed.webp")]
        return {(field[0].replace("~", "/"), int(field[2])) for field in fields}
