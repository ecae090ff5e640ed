"""MLflow's client over rows in memory, with the rules of its SQL store: a row that is equal in every column is one row."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Row = tuple[str, int, int, float]
"""Key, step, time and value."""


class FakeMlflow:
    """Client of one run. `fault` is called before and after each change and may raise, as a kill or a lost answer does."""

    def __init__(self) -> None:
        self.fault: Callable[[], None] = lambda: None
        self.rows: set[Row] = set()
        self.linked: set[tuple[str, Row]] = set()
        self.models: list[SimpleNamespace] = []
        self.outputs: list[SimpleNamespace] = []
        self.files: list[str] = []
        self.tables: dict[str, Any] = {}
        self.artifacts: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}

    def log_batch(self, run_id: str, metrics: Sequence[Any] = (), tags: Sequence[Any] = ()) -> None:
        """Add points and set tags; the links to models are a transaction of their own."""
        self.fault()
        found = [(point.model_id, (point.key, point.step, point.timestamp, point.value)) for point in metrics]
        self.rows |= {row for _, row in found}
        self.fault()
        self.linked |= {(model, row) for model, row in found if model}
        self.tags |= {tag.key: tag.value for tag in tags}
        self.fault()

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        """Set a tag."""
        self.fault()
        self.tags[key] = value
        self.fault()

    def delete_tag(self, run_id: str, key: str) -> None:
        """Remove a tag that is there."""
        self.fault()
        del self.tags[key]
        self.fault()

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        """Replace an artifact."""
        self.fault()
        self.artifacts[f"{folder}/{Path(path).name}" if folder else Path(path).name] = Path(path).read_bytes()
        self.fault()

    def get_run(self, run_id: str) -> Any:
        """Return the run with the last point of each curve."""
        self.fault()
        last: dict[str, Row] = {}
        for row in sorted(self.rows, key=lambda row: row[1:]):
            last[row[0]] = row
        points = [SimpleNamespace(key=key, step=step) for key, step, _, _ in last.values()]
        return SimpleNamespace(
            info=SimpleNamespace(experiment_id="1"),
            data=SimpleNamespace(tags=dict(self.tags), to_proto=lambda: SimpleNamespace(metrics=points)),
            inputs=SimpleNamespace(dataset_inputs=[]),
            outputs=SimpleNamespace(model_outputs=list(self.outputs)),
        )

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        """Return all points of a curve."""
        self.fault()
        return [
            SimpleNamespace(key=name, step=step, timestamp=time_ms, value=value)
            for name, step, time_ms, value in self.rows
            if name == key
        ]

    def search_logged_models(self, experiments: Sequence[str], filter_string: str, **_: int) -> list[Any]:
        """Return the models of a step; none for a filter without one, so that nothing is removed."""
        self.fault()
        found = re.search(r"tags\.step = '(\d+)'", filter_string)
        if found is None:
            return []
        return [model for model in self.models if model.tags["step"] == found[1]]

    def create_logged_model(self, experiment: str, name: str, tags: dict[str, str], model_type: str, **_: str) -> Any:
        """Add a model that is not ready."""
        self.fault()
        model = SimpleNamespace(model_id=uuid.uuid4().hex, tags=tags, model_type=model_type, status="PENDING")
        self.models.append(model)
        self.fault()
        return model

    def log_outputs(self, run_id: str, outputs: Sequence[Any]) -> None:
        """Add models to the outputs of the run."""
        self.fault()
        self.outputs += [SimpleNamespace(model_id=output.model_id) for output in outputs]
        self.fault()

    def finalize_logged_model(self, model_id: str, status: str) -> None:
        """Set the status of a model."""
        self.fault()
        next(model for model in self.models if model.model_id == model_id).status = status
        self.fault()

    def log_dict(self, run_id: str, content: Any, name: str) -> None:
        """Replace an artifact."""
        self.fault()
        self.tables[name] = content
        self.fault()

    def log_image(self, run_id: str, image: Any, key: str, step: int, timestamp: int, synchronous: bool) -> None:
        """Add a picture and then its small copy."""
        name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{timestamp}+{uuid.uuid4()}"
        for suffix in (".png", "+compressed.webp"):
            self.fault()
            self.files.append(name + suffix)
        self.fault()

    def list_artifacts(self, run_id: str, path: str) -> list[Any]:
        """Return the files of the pictures."""
        self.fault()
        return [SimpleNamespace(path=name) for name in self.files]
