"""Look-up of a registered version, of its run and of its files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import RegistryError
from pipeline.registry.card import CARD_NAME, DETECTOR_FOLDER, Card, read_model
from pipeline.tracking.mlflow_client import connect
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from detr.model import DETR


def find_version(client: MlflowClient, uri: str) -> Any:
    """Return the registered version for `models:/NAME@ALIAS` or `models:/NAME/VERSION`; raise `RegistryError`."""
    from mlflow.exceptions import MlflowException

    if not uri.startswith("models:/"):
        raise RegistryError(f"{uri!r} is no registered model; expected models:/NAME@ALIAS or models:/NAME/VERSION")
    rest = uri.removeprefix("models:/")
    name, at, alias = rest.partition("@")
    if not at:
        name, _, version = rest.rpartition("/")
    try:
        if at:
            return client.get_model_version_by_alias(name, alias)
        if not name or not version.isdigit():
            raise RegistryError(f"{uri!r} names no version; expected models:/NAME@ALIAS or models:/NAME/VERSION")
        return client.get_model_version(name, version)
    except MlflowException:
        known = [model.name for model in client.search_registered_models(max_results=1000)]
        if name in known:
            model = client.get_registered_model(name)
            aliases = ", ".join(f"@{alias}" for alias in model.aliases) or "no alias"
            raise RegistryError(
                f"registered model {name!r} has no {rest.removeprefix(name)}; it has {aliases}"
            ) from None
        listed = ", ".join(sorted(known)) or "none yet"
        raise RegistryError(f"there is no registered model {name!r}; expected one of: {listed}") from None


def pinned(uri: str) -> str:
    """Return the address `models:/NAME/VERSION` of a version, which stays the same when its alias moves."""
    version = find_version(connect(), uri)
    return f"models:/{version.name}/{version.version}"


def run_of(client: MlflowClient, uri: str) -> str:
    """Return the id of the run that a registered version came from; raise `RegistryError` for an imported one."""
    version = find_version(client, uri)
    imported = version.tags.get("imported_from")
    if imported:
        raise RegistryError(
            f"{uri} was imported from {imported.split()[0]}, so it has no run to continue; expected a version of a run of "
            f"`detr train`: `detr train finetune --initial {uri}` starts one from it"
        )
    return str(version.run_id)


def resolve(uri: str, folder: Path) -> Path:
    """Fetch weights and card of a registered version into `folder`, and nothing else; return the folder with both.

    The caller removes `folder`: weights are large, and a temporary folder that keeps them fills up.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    version = find_version(connect(), uri)
    source = f"models:/{version.name}/{version.version}"
    problem = f"no {CARD_NAME} in {DETECTOR_FOLDER}"
    try:
        fetched = Path(mlflow.artifacts.download_artifacts(f"{source}/{DETECTOR_FOLDER}", dst_path=str(folder)))
        if (fetched / CARD_NAME).is_file():
            return fetched
    except (MlflowException, OSError) as error:
        problem = one_line(error)
    if _is_without_card(source):
        raise RegistryError(f"{uri} holds no {CARD_NAME}; expected a model registered by `detr`")
    raise RegistryError(
        f"the files of {uri} cannot be fetched ({problem}); expected them in the artifact store: "
        "is it mounted or reachable from here?"
    )


def _is_without_card(source: str) -> bool:
    """Return True if a version has files and no card among them; a failed download of it says something else."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        if not mlflow.artifacts.list_artifacts(artifact_uri=source):
            return False
        entries = mlflow.artifacts.list_artifacts(artifact_uri=f"{source}/{DETECTOR_FOLDER}")
    except (MlflowException, OSError):
        return False
    return all(Path(entry.path).name != CARD_NAME for entry in entries)


def read_version(uri: str) -> tuple[DETR, Card]:
    """Return the model of a registered version, in evaluation mode on the CPU, and its card; leave no file behind."""
    with tempfile.TemporaryDirectory() as folder:
        return read_model(resolve(uri, Path(folder)))
