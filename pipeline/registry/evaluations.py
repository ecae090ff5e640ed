"""Figures of `detr evaluate` in MLflow: a run below that of the version, and metrics of its logged model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.registry.facts import model_id_of
from pipeline.registry.pages import write_pages
from pipeline.registry.versions import find_version
from pipeline.tracking.events import now_ms
from pipeline.tracking.mlflow_client import connect, translated_errors
from pipeline.tracking.mlflow_runs import origin_tags
from pipeline.tracking.pages.data import data_set, dataset_input, metric_data
from pipeline.tracking.pages.links import run_link
from pipeline.tracking.pages.listed import list_table
from pipeline.tracking.tags import TAG_EVALUATED
from shards.dataset.manifest import Manifest

if TYPE_CHECKING:
    from PIL import Image

EVALUATION = "evaluation"
"""Use of a data set by a run of `detr evaluate`."""


def keep_figures(
    uri: str,
    manifest: Manifest,
    metrics: Mapping[str, float],
    images: int,
    *,
    tables: Mapping[str, Mapping[str, list[Any]]] | None = None,
    pictures: Mapping[str, Image.Image] | None = None,
) -> str:
    """Record the metrics of a version on a data set as a run of their own; return a link to its page.

    The run is nested below that of the version, and names the version and the data with its digest. `tables` and `pictures`
    are artifacts by name. Raise `TrackingError` if MLflow refuses.
    """
    from mlflow.entities import LoggedModelInput, Metric, Param

    client = connect()
    with translated_errors("the figures are only printed"):
        version = find_version(client, uri)
        name, number, model_id = str(version.name), str(version.version), model_id_of(version)
        experiment = client.get_run(version.run_id).info.experiment_id
        command = f"detr evaluate models:/{name}/{number}"
        tags = {
            **origin_tags(command),
            "mlflow.parentRunId": version.run_id,
            TAG_EVALUATED: f"models:/{name}/{number}",
        }
        run = client.create_run(experiment, run_name=f"{name} v{number} on {manifest.name}", tags=tags)
        run_id = str(run.info.run_id)
        try:
            models = [LoggedModelInput(model_id)] if model_id else []
            client.log_inputs(run_id, [dataset_input(EVALUATION, data_set(manifest))], models)
            data = metric_data(client.get_run(run_id), EVALUATION)
            now, of_model = now_ms(), {"model_id": model_id, **data} if model_id else {}
            step = int(version.tags.get("step", 0))
            points = [
                Metric(f"evaluate/{key}", value, now, step, **of_model) for key, value in metrics.items() if value >= 0
            ]
            values = {"model": f"models:/{name}/{number}", "data": manifest.url, "images": str(images)}
            client.log_batch(run_id, points, [Param(key, value) for key, value in values.items()])
            for path, columns in (tables or {}).items():
                rows = [list(row) for row in zip(*columns.values(), strict=True)]
                client.log_dict(run_id, {"columns": list(columns), "data": rows}, path)
                list_table(client, run_id, path)
            for path, picture in (pictures or {}).items():
                client.log_image(run_id, picture, path)
        except BaseException:
            client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")
        write_pages(client, name, number)
        return run_link(str(experiment), run_id)
