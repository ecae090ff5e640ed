"""Upload of weights and their card as a version in the model registry.

A version is a logged model with the weights (safetensors), the card (JSON), the code that serves it and the list of
packages it needs. It is enough to evaluate, to serve, and to trace the data, code and configuration, or the imported file.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import RegistryError, TrackingAway, TrackingError
from pipeline.figures import TAGGED, deciding_name
from pipeline.registry.card import Card, write_folder
from pipeline.registry.logged_models import list_version, logged_model
from pipeline.registry.mlflow_model import write_mlflow_model
from pipeline.tracking.server.address import tracking_uri
from pipeline.tracking.server.answers import is_away, is_refused_login, reason, refused_login
from pipeline.tracking.tags import TAG_FILES

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

    from detr.model import DETR

_FILES = "weights, card, code"


class Registered(NamedTuple):
    """Result of a registration."""

    version: str
    """Number of the version."""
    alias_moved: bool
    """True if the alias points at this version now, false if it stayed on a better one."""
    note: str = ""
    """Change in AP against the version that had the alias, with its interval; empty if that is not known."""


def publish(
    client: MlflowClient,
    model: DETR,
    card: Card,
    *,
    name: str,
    alias: str,
    retry_command: str,
    only_if_better: bool = False,
) -> Registered:
    """Register a model and its card as a version of `name`, and point `alias` at it.

    A step of a run is published once; publishing it again finds that version. With `only_if_better`, the alias stays on a
    version with a higher AP on the same validation data. `retry_command` repeats this, for the message. Raise `TrackingError` if MLflow refuses.
    """
    check_names(name, alias)
    with _one_line_errors(name, retry_command):
        version = _version_of(client, name, card)
        if version is None:
            logged = logged_model(client, card, _tags(card))
            if logged.tags.get(TAG_FILES) != _FILES:
                _upload(client, logged, model, card)
            version = _create_version(client, name, logged.model_id, card)
            list_version(client, logged.model_id, name, version.version)
        if only_if_better and _is_worse(client, name, alias, version):
            return Registered(str(version.version), False)
        client.set_registered_model_alias(name, alias, version.version)
        return Registered(str(version.version), True)


def check_names(name: str, alias: str) -> None:
    """Raise `RegistryError` for a name or alias that the registry would refuse, before anything is uploaded."""
    if not name.strip() or set(name) & set("/:"):
        raise RegistryError(f"{name!r} cannot name a registered model; expected a name without / and :")
    reserved = alias.lower() == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE)
    if reserved or not re.fullmatch(r"[\w-]+", alias, re.ASCII):
        raise RegistryError(
            f"{alias!r} cannot be an alias; expected letters, digits, _ and -, and neither `latest` nor a version (v1)"
        )


@contextmanager
def _one_line_errors(name: str, retry_command: str) -> Generator[None, None, None]:
    """Raise a one-line `TrackingError` for an error of MLflow in the block.

    Run, checkpoints and files are not touched, so registering can be repeated.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:  # errors of `requests` are OSErrors
        if is_refused_login(error):
            raise TrackingAway(f"{refused_login(tracking_uri())}; `{retry_command}` tries again") from None
        raise (TrackingAway if is_away(error) else TrackingError)(
            f"registering {name!r} failed ({reason(error)}); expected a store that takes the version: "
            f"`{retry_command}` tries again"
        ) from None


def _upload(client: MlflowClient, logged: LoggedModel, model: DETR, card: Card) -> None:
    """Write the MLflow model with these weights and upload it as the files of a logged model."""
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    # With the tag it stays if its checkpoint is pruned meanwhile.
    client.set_logged_model_tags(logged.model_id, {TAG_FILES: "uploading"})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_folder(folder / "detector", model, card)
        description = Model(run_id=card.run_id, model_id=logged.model_id)
        write_mlflow_model(folder / "model", folder / "detector", description)
        client.log_model_artifacts(logged.model_id, str(folder / "model"))
    if logged.status != "READY":
        client.log_outputs(card.run_id, [LoggedModelOutput(logged.model_id, step=card.step)])
        client.finalize_logged_model(logged.model_id, "READY")
    client.set_logged_model_tags(logged.model_id, {TAG_FILES: _FILES})


def _version_of(client: MlflowClient, name: str, card: Card) -> ModelVersion | None:
    """Return the version of `name` that was registered for this step of this run, or None."""
    for version in client.search_model_versions(f"run_id = '{card.run_id}'"):
        if version.name == name and version.tags.get("step") == str(card.step):
            return version
    return None


def _is_worse(client: MlflowClient, name: str, alias: str, version: ModelVersion) -> bool:
    """Return True if `alias` points at a version with a higher AP than `version` on the same validation data.

    PQ, or the AP of masks, is compared if both versions have it.
    """
    number = client.get_registered_model(name).aliases.get(alias)
    if number is None:
        return False
    current = client.get_model_version(name, number).tags
    if "AP" not in current or current.get("val_digest") != version.tags.get("val_digest"):
        return False
    name = deciding_name(current, version.tags)
    return float(current[name]) > float(version.tags.get(name, "-1"))


def _create_version(client: MlflowClient, name: str, model_id: str, card: Card) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return client.create_model_version(
        name, source=f"models:/{model_id}", run_id=card.run_id, model_id=model_id, tags=_tags(card)
    )


def _tags(card: Card) -> dict[str, str]:
    """Return the tags of a version; an imported one has its file and nothing about training."""
    if card.imported_from:
        return {"imported_from": card.imported_from, "code_commit": card.code_commit}
    metrics = {name: f"{card.metrics[name]:.6f}" for name in TAGGED if name in card.metrics}
    ema = {"ema": f"{card.ema:g}"} if card.ema else {}
    return {
        "checkpoint_uri": card.checkpoint,
        "step": str(card.step),
        "epoch": f"{card.epoch:g}",
        "code_commit": card.code_commit,
        "train_digest": card.train_digest,
        "val_digest": card.val_digest,
        **ema,
        **metrics,
    }
