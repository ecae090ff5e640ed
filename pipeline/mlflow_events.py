"""The spool's events, sent to one MLflow run: points, pictures, tables, tags and evaluated checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from pipeline.errors import first_line
from pipeline.mlflow_store import connect
from pipeline.track import Event

if TYPE_CHECKING:
    from mlflow import MlflowClient


LOG = logging.getLogger(__name__)


class EventSender:
    """Sends spooled events to one run. Sending the same metric twice is one row in MLflow."""

    def __init__(self, uri: str, run_id: str, folder: Path) -> None:
        self._uri, self._run_id, self._folder = uri, run_id, folder
        self._client: MlflowClient | None = None

    def __call__(self, events: Sequence[Event]) -> None:
        """Send all, or raise: the caller then sends all again."""
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
                # Written as the UI's table artifact; a second one of a name would be appended to by log_table.
                content = {
                    "columns": list(event.columns),
                    "data": list(map(list, zip(*event.columns.values(), strict=True))),
                }
                client.log_dict(self._run_id, content, event.name)
            elif event.kind == "checkpoint":
                self._checkpoint(client, event)

    def _picture(self, client: MlflowClient, event: Event) -> None:
        path = self._folder / event.tags["file"]
        if not path.exists():
            return  # sent by an attempt that died before it noted so
        try:
            with Image.open(path) as opened:
                image = opened.copy()
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's, and it may pass; what Pillow says about a picture has no number
            # Trying again would only keep all later events from being sent.
            LOG.warning("picture %s is dropped: it cannot be decoded (%s)", path, first_line(error))
            return
        client.log_image(
            self._run_id, image, key=event.name, step=event.step, timestamp=event.time_ms, synchronous=True
        )
        path.unlink()

    def _checkpoint(self, client: MlflowClient, event: Event) -> None:
        """A checkpoint is a metadata-only logged model: ranked by its figures in the UI, its bytes stay in the store."""
        from mlflow.entities import LoggedModelOutput, Metric

        run = client.get_run(self._run_id)
        known = client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{self._run_id}'")
        # A version that was registered before this was sent names the checkpoint that it was made of, too.
        mine = (one for one in known if one.model_type == "checkpoint" and one.tags.get("checkpoint_uri") == event.name)
        model = next(mine, None)
        if model is not None and model.status == "READY":
            return
        # One that is not ready was left halfway by an attempt that died: what follows completes it.
        model = model or client.create_logged_model(
            run.info.experiment_id,
            name=f"step-{event.step:08d}",
            source_run_id=self._run_id,
            tags={"checkpoint_uri": event.name, "step": str(event.step)},
            model_type="checkpoint",
        )
        if model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
            client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step=event.step)])
        linked = [Metric(n, v, event.time_ms, event.step, model_id=model.model_id) for n, v in event.values.items()]
        client.log_batch(self._run_id, metrics=linked)
        client.finalize_logged_model(model.model_id, "READY")
