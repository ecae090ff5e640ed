"""Kept detections as artifacts of the run of a version: one file for each step and data set."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint.location import Location
from pipeline.errors import RegistryError
from pipeline.evaluation.kept import Kept, from_bytes, read_beside, to_bytes
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOG = logging.getLogger(__name__)
_FOLDER = "detections"
_DIGITS = 16  # of a digest, in names of files


def store(client: MlflowClient, run_id: str, step: int, kept: Kept) -> None:
    """Store the detections of a step of a run; those of the same step and data set are replaced."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{_prefix(step)}{short_digest(kept.digest)}.safetensors"
        path.write_bytes(to_bytes(kept))
        client.log_artifact(run_id, str(path), _FOLDER)


def store_of_checkpoint(client: MlflowClient, run_id: str, step: int, checkpoint: Location) -> None:
    """Store the detections beside a checkpoint, which outlive it then; if that fails, only log why."""
    try:
        kept = read_beside(checkpoint)
        if kept is not None and short_digest(kept.digest) not in stored(client, run_id, step):
            store(client, run_id, step, kept)
    except Exception as error:  # the client and the store behind it may raise anything
        LOG.warning("the detections of %s are not in MLflow (%s); compare with --data", checkpoint, one_line(error))


def stored(client: MlflowClient, run_id: str, step: int) -> dict[str, str]:
    """Return the files of a step by the first digits of the digest of the data set, as `short_digest` gives them."""
    names = [Path(entry.path).name for entry in client.list_artifacts(run_id, _FOLDER)]
    prefix = _prefix(step)
    return {name.removeprefix(prefix).partition(".")[0]: name for name in names if name.startswith(prefix)}


def fetch(client: MlflowClient, run_id: str, name: str) -> Kept:
    """Return the detections of a file that `stored` names."""
    from mlflow.exceptions import MlflowException

    source = f"{_FOLDER}/{name}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            content = Path(client.download_artifacts(run_id, source, folder)).read_bytes()
        except (MlflowException, OSError) as error:
            raise RegistryError(
                f"{source} of run {run_id[:8]} cannot be fetched ({one_line(error)}); expected it in the artifact store: is "
                "it mounted or reachable from here?"
            ) from None
    return from_bytes(content, f"{source} of run {run_id[:8]}")


def short_digest(digest: str) -> str:
    """Return the digits of a digest that are in names of files."""
    return digest[:_DIGITS]


def _prefix(step: int) -> str:
    return f"step-{step:08d}-"
