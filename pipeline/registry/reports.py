"""Reports of evaluations as artifacts of the run that a registered version came from."""

from __future__ import annotations

from pathlib import Path

from pipeline.registry.versions import find_version
from pipeline.tracking.mlflow_client import connect, translated_errors


def keep_report(uri: str, page: Path, data_digest: str) -> str:
    """Store a page as an artifact of the version's run and return its path there, one for each version and data set."""
    client = connect()
    with translated_errors():
        version = find_version(client, uri)
        folder = f"reports/{version.name}-{version.version}-{data_digest[:8]}"
        client.log_artifact(version.run_id, str(page), folder)
    return f"{folder}/{page.name}"
