"""Checkpoints of a run in MLflow: logged models, which go when pruning has deleted the checkpoint.

MLflow's page of a logged model has a button that registers it, also for a checkpoint that is no longer there.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from pipeline.run_folder import META
from pipeline.tracking.mlflow_client import unavailable
from pipeline.tracking.mlflow_reported import CHECKPOINT
from pipeline.tracking.tags import TAG_CHECKPOINT, TAG_FILES, TAG_MODEL_VERSIONS
from shards.errors import ShardError, one_line
from shards.store import storage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

LOG = logging.getLogger(__name__)


def describe_checkpoint(run_id: str, step: int) -> str:
    """Return the description of a logged model without files: the button on its page cannot bring them."""
    return (
        f"Metrics of the checkpoint of step {step:,}. Its weights are in the storage of the run, not here: the button "
        f"*Register model* makes a version without weights. `detr register {run_id[:8]} --name NAME` registers the run's "
        "best checkpoint with them."
    )


def drop_deleted(client: MlflowClient, experiment_id: str, run_id: str) -> list[str]:
    """Remove the logged models of checkpoints that are deleted, and return their names; those with versions stay.

    Nothing is removed if no checkpoint is there, since this machine may not see the storage of the run. A store or an MLflow
    that does not answer, or a user who may not delete, costs only the list on MLflow's page: that is logged, not raised.
    """
    dropped: list[str] = []
    expected: tuple[type[Exception], ...] = (*unavailable(), ShardError)
    try:
        for model in _deleted(client, experiment_id, run_id):
            client.delete_logged_model(model.model_id)
            dropped.append(str(model.name))
    except expected as error:
        LOG.warning("MLflow may still show checkpoints that are deleted (%s)", one_line(error))
    return dropped


def _deleted(client: MlflowClient, experiment_id: str, run_id: str) -> list[LoggedModel]:
    found = client.search_logged_models([experiment_id], filter_string=f"source_run_id = '{run_id}'", max_results=1000)
    checkpoints = [model for model in found if model.model_type == CHECKPOINT]
    deleted = [model for model in checkpoints if not storage.exists(storage.join(model.tags[TAG_CHECKPOINT], META))]
    if len(deleted) == len(checkpoints):
        return []
    return [model for model in deleted if TAG_FILES not in model.tags and TAG_MODEL_VERSIONS not in model.tags]
