"""The logged model that a version is made of: that of its checkpoint, which has the metrics and their data set already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.registry.card import Card
from pipeline.tracking.events import Event, now_ms
from pipeline.tracking.mlflow_client import tracking_uri
from pipeline.tracking.mlflow_reported import Reported
from pipeline.tracking.mlflow_sender import EventSender
from pipeline.tracking.tags import TAG_FILES, TAG_MODEL_VERSIONS

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel


def logged_model(client: MlflowClient, card: Card, tags: Mapping[str, str]) -> LoggedModel:
    """Return the logged model for the files of a version: that of the checkpoint, or a new one for an imported model."""
    parameters = {"recipe": card.recipe or "-", "backbone": card.model.backbone}
    experiment = client.get_run(card.run_id).info.experiment_id
    if card.imported_from:
        return client.create_logged_model(
            experiment,
            name="imported",
            source_run_id=card.run_id,
            tags=dict(tags),
            params=parameters,
            model_type="detector",
        )
    found = _of_checkpoint(client, card, experiment)
    if TAG_FILES not in found.tags:
        client.set_logged_model_tags(found.model_id, dict(tags))
        if not found.params:
            client.log_model_params(found.model_id, parameters)
    return found


def _of_checkpoint(client: MlflowClient, card: Card, experiment: str) -> LoggedModel:
    """Return the logged model of the checkpoint; log it first if the workers' events have not reached MLflow yet."""
    reported = Reported(client, card.run_id, any_order=True)
    found = reported.checkpoint(experiment, card.checkpoint, card.step)
    if found is None or found.status != "READY":
        figures = {f"val/{name}": value for name, value in card.metrics.items() if value >= 0}
        event = Event(kind="checkpoint", time_ms=now_ms(), step=card.step, name=card.checkpoint, values=figures)
        EventSender(tracking_uri(), card.run_id, Path(), any_order=True)([event])
        found = reported.checkpoint(experiment, card.checkpoint, card.step)
    assert found is not None
    return found


def list_version(client: MlflowClient, model_id: str, name: str, version: str) -> None:
    """Let the page of a logged model name a version; MLflow's servers do that, its client without a server does not."""
    tags = client.get_logged_model(model_id).tags
    listed = msgspec.json.decode(tags.get(TAG_MODEL_VERSIONS, "[]"), type=list[dict[str, Any]])
    entry = {"name": name, "version": str(version)}
    if entry not in [{key: str(value) for key, value in known.items()} for known in listed]:
        client.set_logged_model_tags(model_id, {TAG_MODEL_VERSIONS: msgspec.json.encode([*listed, entry]).decode()})
