"""Sender of the spool's events to an MLflow run: points, pictures, tables, tags and evaluated checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.spool import Event
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient


LOG = logging.getLogger(__name__)


class EventSender:
    """Sender of spooled events to one run. An event may be sent twice: MLflow keeps equal metrics once."""

    def __init__(self, uri: str, run_id: str, folder: Path) -> None:
        self._uri, self._run_id, self._folder = uri, run_id, folder
        self._client: MlflowClient | None = None

    def __call__(self, events: Sequence[Event]) -> None:
        """Send all events, or raise; the caller then sends all of them again."""
        if self._client is None:
            self._client = connect(self._uri)
        client = self._client
        from mlflow.entities import Metric, RunTag

        metrics = [
            Metric(name, value, event.time_ms, event.step)
            for event in events
            if event.kind == "metrics"
            for name, value in event.values.items()
        ]
        for start in range(0, len(metrics), 1000):
            client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
        tags = {key: value for event in events if event.kind == "tags" for key, value in event.tags.items()}
        if tags:
            client.log_batch(self._run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        for event in events:
            if event.kind == "picture":
                self._picture(client, event)
            elif event.kind == "table":
                # In the UI's format of tables. `log_table` would append to an earlier table of this name.
                content = {
                    "columns": list(event.columns),
                    "data": [list(row) for row in zip(*event.columns.values(), strict=True)],
                }
                client.log_dict(self._run_id, content, event.name)
            elif event.kind == "checkpoint":
                self._checkpoint(client, event)

    def _picture(self, client: MlflowClient, event: Event) -> None:
        path = self._folder / event.tags["file"]
        if not path.exists():
            return  # sent by an attempt that died before it moved the cursor
        try:
            with Image.open(path) as opened:
                image = opened.copy()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk, which may pass; Pillow's own errors have no number
            # Trying again would block all later events.
            LOG.warning("picture %s is dropped: it cannot be decoded (%s)", path, one_line(error))
            return
        client.log_image(
            self._run_id, image, key=event.name, step=event.step, timestamp=event.time_ms, synchronous=True
        )
        path.unlink()

    def _checkpoint(self, client: MlflowClient, event: Event) -> None:
        """Log a checkpoint as a model without files, which the UI ranks by its metrics; the files stay in the store."""
        from mlflow.entities import LoggedModelOutput, Metric

        run = client.get_run(self._run_id)
        known = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{self._run_id}'")
        # The type matters: a version that was registered in the meantime has the tag of its checkpoint, too.
        same = (m for m in known if m.model_type == "checkpoint" and m.tags.get("checkpoint_uri") == event.name)
        model = next(same, None)
        if model is not None and model.status == "READY":
            return
        # A model that is not ready was left incomplete by an attempt that died, and is completed here.
        model = model or client.create_logged_model(
            run.info.experiment_id,
            name=f"step-{event.step:08d}",
            source_run_id=self._run_id,
            tags={"checkpoint_uri": event.name, "step": str(event.step)},
            model_type="checkpoint",
        )
        if model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
            client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step=event.step)])
        linked = [
            Metric(name, value, event.time_ms, event.step, model_id=model.model_id)
            for name, value in event.values.items()
        ]
        client.log_batch(self._run_id, metrics=linked)
        client.finalize_logged_model(model.model_id, "READY")
