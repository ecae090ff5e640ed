"""Tags of a run that its pages in MLflow follow: the list of tables, and warnings, which go when they have passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TABLES = "mlflow.loggedArtifacts"


def list_table(client: MlflowClient, run_id: str, name: str) -> None:
    """Let MLflow show the JSON artifact `name` as a table, also side by side with those of other runs."""
    tables = msgspec.json.decode(client.get_run(run_id).data.tags.get(_TABLES, "[]"))
    entry = {"path": name, "type": "table"}
    if entry not in tables:
        client.set_tag(run_id, _TABLES, msgspec.json.encode([*tables, entry]).decode())


def write_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run, and remove those whose text is empty: an empty one would still be on its page."""
    from mlflow.entities import RunTag

    kept = [RunTag(key, value) for key, value in tags.items() if value]
    if kept:
        client.log_batch(run_id, tags=kept)
    passed = [key for key, value in tags.items() if not value]
    present = client.get_run(run_id).data.tags if passed else {}
    for key in passed:
        if key in present:
            client.delete_tag(run_id, key)
