"""Sender of the spool's events to an MLflow run: points, pictures, tables, tags and evaluated checkpoints."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, UnidentifiedImageError

from pipeline.errors import TrackingError
from pipeline.tracking.events import Event
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_reported import CHECKPOINT, Reported
from pipeline.tracking.pages.checkpoints import describe_checkpoint, drop_deleted
from pipeline.tracking.pages.data import metric_data
from pipeline.tracking.pages.listed import list_table, write_tags
from pipeline.tracking.spool_folder import SpoolFolder
from pipeline.tracking.tags import TAG_CHECKPOINT, TAG_NOTE, TAG_SENDER
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient


LOG = logging.getLogger(__name__)


class EventSender:
    """Sender of spooled events to one run; `folder` holds their pictures.

    An event may be sent twice: what the run has is dropped. MLflow is asked for that before the first event, and again
    after a failure, when the node may have been cut off. If another node continues the run meanwhile, nothing more is
    sent from here. With `any_order` the points of a curve may come in any order, and several nodes may send.
    """

    def __init__(self, uri: str, run_id: str, folder: Path, any_order: bool = False) -> None:
        self._uri, self._run_id, self._folder, self._any_order = uri, run_id, folder, any_order
        self._client: MlflowClient | None = None
        self._reported: Reported | None = None
        self._claimed = False
        self._listed: set[str] = set()

    def __call__(self, events: Sequence[Event]) -> None:
        """Send all events, or raise; the caller then sends all of them again."""
        if self._client is None:
            self._client = connect(self._uri)
        if self._reported is None:
            self._claim(self._client)
            self._reported = Reported(self._client, self._run_id, self._any_order)
        try:
            self._send(events, self._client, self._reported)
        except BaseException:
            self._reported = None
            raise

    def _claim(self, client: MlflowClient) -> None:
        """Become the sender of the run at first; later raise `TrackingError` if another has become it."""
        if self._any_order:
            return
        spool = SpoolFolder(self._folder).id
        if client.get_run(self._run_id).data.tags.get(TAG_SENDER, "") != spool:
            if self._claimed:
                raise TrackingError("another node continues the run; expected this one to have ended")
            client.set_tag(self._run_id, TAG_SENDER, spool)
        self._claimed = True

    def _send(self, events: Sequence[Event], client: MlflowClient, reported: Reported) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, event.time_ms, event.step)
            for event in events
            if event.kind == "metrics"
            for name, value in event.values.items()
            if not reported.has_point(name, event.step)
        ]
        for start in range(0, len(metrics), 1000):
            client.log_batch(self._run_id, metrics=metrics[start : start + 1000])
        tags = {key: value for event in events if event.kind == "tags" for key, value in event.tags.items()}
        if tags:
            write_tags(client, self._run_id, tags)
        for event in events:
            if event.kind == "picture":
                self._picture(client, reported, event)
            elif event.kind == "file":
                self._file(client, reported, event)
            elif event.kind == "table":
                self._table(client, reported, event)
            elif event.kind == "checkpoint":
                self._checkpoint(client, reported, event)

    def _picture(self, client: MlflowClient, reported: Reported, event: Event) -> None:
        path = self._folder / event.tags["file"]
        if not path.exists():
            return  # sent by an attempt that died before it moved the cursor
        if not reported.has_picture(event.name, event.step):
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

    def _file(self, client: MlflowClient, reported: Reported, event: Event) -> None:
        path = self._folder / event.tags["file"]
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return  # sent already, or a newer one follows
        if event.step >= reported.last_evaluated:
            folder, _, name = event.name.rpartition("/")
            with tempfile.TemporaryDirectory() as temporary:
                (Path(temporary) / name).write_bytes(content)
                client.log_artifact(self._run_id, str(Path(temporary) / name), folder or None)
        path.unlink(missing_ok=True)

    def _table(self, client: MlflowClient, reported: Reported, event: Event) -> None:
        """Log a table in the UI's format. `log_table` would append to an earlier table of this name."""
        if event.step and event.step < reported.last_evaluated:
            return  # a table with a step belongs to an evaluation, and another node has sent that of a later one
        rows = [list(row) for row in zip(*event.columns.values(), strict=True)]
        client.log_dict(self._run_id, {"columns": list(event.columns), "data": rows}, event.name)
        if event.name not in self._listed:
            list_table(client, self._run_id, event.name)
            self._listed.add(event.name)

    def _checkpoint(self, client: MlflowClient, reported: Reported, event: Event) -> None:
        """Log a checkpoint as a model without files, which the UI ranks by its metrics; the files stay in the store."""
        from mlflow.entities import LoggedModelOutput, Metric

        run = client.get_run(self._run_id)
        model = reported.checkpoint(run.info.experiment_id, event.name, event.step)
        ready = model is not None and model.status == "READY"
        if ready and all(reported.has_point(name, event.step) for name in event.values):
            return
        # A model that is not ready was left incomplete by an attempt that died, and is completed here; a registration may have
        # made it with less. Points that are there but not linked to it are linked with the value and time that they have.
        known = {} if model is None else {name: reported.point(name, event.step) for name in event.values}
        model = model or client.create_logged_model(
            run.info.experiment_id,
            name=f"step-{event.step:08d}",
            source_run_id=self._run_id,
            tags={
                TAG_CHECKPOINT: event.name,
                "step": str(event.step),
                TAG_NOTE: describe_checkpoint(self._run_id, event.step),
            },
            model_type=CHECKPOINT,
        )
        if model.model_id not in {output.model_id for output in run.outputs.model_outputs}:
            client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step=event.step)])
        points = [
            known.get(name) or Metric(name, value, event.time_ms, event.step) for name, value in event.values.items()
        ]
        data = metric_data(run, "validation")
        linked = [
            Metric(
                *(point.key, point.value, point.timestamp, point.step),
                model_id=model.model_id,
                **(data if point.key.startswith("val/") else {}),
            )
            for point in points
        ]
        client.log_batch(self._run_id, metrics=linked)
        if not ready:
            client.finalize_logged_model(model.model_id, "READY")
        drop_deleted(client, run.info.experiment_id, self._run_id)
