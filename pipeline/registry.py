"""The model registry: publish a checkpoint as a version, and find a version again.

A version is a logged model with the weights (safetensors), the card (JSON), the code that serves it and the packages it
needs. It is enough to evaluate, to serve, to resume, and to say from which data, code and configuration it came.
"""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline import checkpoint
from pipeline.config import RunConfig
from pipeline.errors import RegistryError, TrackingError, first_line
from pipeline.mlflow_store import connect, find_run
from pipeline.predict import CARD_NAME, Card, write_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pillow",
    "msgspec",
    "safetensors",
    "mlflow",
    "fsspec",
    "pycocotools",
)


class Registered(NamedTuple):
    """What registering came to."""

    version: str
    """The version's number."""
    alias_moved: bool
    """Whether the alias points at it now; false where it stayed on a better version."""


def register(
    client: MlflowClient,
    run_id: str,
    config: RunConfig,
    path: Path,
    metrics: Mapping[str, float],
    *,
    name: str,
    alias: str,
    only_if_better: bool = False,
) -> Registered:
    """Publish the checkpoint at `path` as a version of `name` and point `alias` at it.

    A step of a run is published once: doing it again finds that version. With `only_if_better` the alias stays where
    it is on a version of higher AP over the same validation data. Raises `TrackingError` when MLflow refuses.
    """
    from pipeline.weights import build_trained
    from shards.manifest import load_manifest

    _check_names(name, alias)
    meta = checkpoint.read_meta(path)
    train = load_manifest(config.data.train)
    model = build_trained(config, train.num_classes)
    checkpoint.load_weights(path, model)
    card = Card(
        model=config.model,
        transform=config.transform,
        categories=train.categories,
        evaluate_batch_size=config.evaluate.batch_size,
        recipe=config.recipe,
        run_id=run_id,
        checkpoint=str(path),
        step=meta.step,
        epoch=meta.epoch,
        metrics=dict(metrics),
        train_digest=meta.train_digest,
        val_digest=load_manifest(config.data.val).digest,
        code_commit=meta.code_commit,
    )
    with _explained(run_id, name, alias):
        version = _version_of(client, name, card)
        if version is None:
            with tempfile.TemporaryDirectory() as folder:
                write_folder(Path(folder) / "detector", model, card)
                version = _publish(client, name, _log_model(client, run_id, card, Path(folder)), card)
        if only_if_better and _is_worse(client, name, alias, version):
            return Registered(str(version.version), False)
        client.set_registered_model_alias(name, alias, version.version)
        return Registered(str(version.version), True)


@contextmanager
def _explained(run_id: str, name: str, alias: str) -> Generator[None, None, None]:
    """One line instead of MLflow's traceback; the run and its checkpoints are whole, so registering can be repeated."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:  # what `requests` raises is an OSError
        again = f"detr register {run_id} --name {name}" + (f" --alias {alias}" if alias != "best" else "")
        raise TrackingError(
            f"registering {name!r} failed ({first_line(error)}); expected a store that takes the version: "
            f"`{again}` tries again"
        ) from None


def register_run(name_or_id: str, *, name: str, alias: str) -> Registered:
    """Publish the best checkpoint of a run, finished or not, and point `alias` at it whatever it pointed at."""
    from pipeline.config import from_json
    from pipeline.mlflow_store import TAG_FOLDER, read_config

    client = connect()
    run = find_run(client, name_or_id)
    run_id = str(run.info.run_id)
    found = checkpoint.best(Path(run.data.tags[TAG_FOLDER]))
    if found is None:
        raise RegistryError(
            f"run {name_or_id} has no evaluated checkpoint yet; expected one: wait for its first evaluation"
        )
    path, metrics = found
    return register(client, run_id, from_json(read_config(client, run_id)), path, metrics, name=name, alias=alias)


def _check_names(name: str, alias: str) -> None:
    """Refuse what the registry would refuse, before anything is uploaded."""
    if not name.strip() or set(name) & set("/:"):
        raise RegistryError(f"{name!r} cannot name a registered model; expected a name without / and :")
    reserved = alias.lower() == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE)
    if reserved or not re.fullmatch(r"[\w-]+", alias, re.ASCII):
        raise RegistryError(
            f"{alias!r} cannot be an alias; expected letters, digits, _ and -, and neither `latest` nor a version (v1)"
        )


def _log_model(client: MlflowClient, run_id: str, card: Card, folder: Path) -> str:
    """Write the MLflow model (models from code, nothing pickled) and upload it as a logged model of the run."""
    import mlflow
    import mlflow.pyfunc.model
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model
    from mlflow.models.signature import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id,
        name=f"{card.recipe or 'detr'}-step-{card.step:08d}",
        source_run_id=run_id,
        tags=_tags(card),
        params={"recipe": card.recipe, "backbone": card.model.backbone},
        model_type="detector",
    )
    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "image")]),
        outputs=Schema([ColSpec(DataType.string)]),
        params=ParamSchema([ParamSpec("threshold", DataType.double, 0.5)]),
    )
    # Recorded and dropped: MLflow advises type hints, by a filter of its own that overrules `ignore`; the signature
    # above says it better.
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")  # recorded, too, where a warning is an error
        mlflow.pyfunc.save_model(
            path=folder / "model",
            python_model=str(_ROOT / "pipeline" / "serve.py"),
            artifacts={"detector": str(folder / "detector")},
            code_paths=[str(_ROOT / package) for package in ("detr", "shards", "pipeline")],
            signature=signature,
            pip_requirements=[f"{package}=={importlib.metadata.version(package)}" for package in _PACKAGES],
            mlflow_model=Model(run_id=run_id, model_id=logged.model_id),
        )
    client.log_model_artifacts(logged.model_id, str(folder / "model"))
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=card.step)])
    client.finalize_logged_model(logged.model_id, "READY")
    return str(logged.model_id)


def _version_of(client: MlflowClient, name: str, card: Card) -> ModelVersion | None:
    """The version of `name` that this step of this run already became."""
    found = client.search_model_versions(f"run_id = '{card.run_id}'")
    mine = (one for one in found if one.name == name and one.tags.get("step") == str(card.step))
    return next(mine, None)


def _is_worse(client: MlflowClient, name: str, alias: str, version: ModelVersion) -> bool:
    """Whether `alias` is on a version with a higher AP than this one's, over the same validation data.

    The AP is that of masks where both versions have it.
    """
    number = client.get_registered_model(name).aliases.get(alias)
    if number is None:
        return False
    current = client.get_model_version(name, number).tags
    if "AP" not in current or current.get("val_digest") != version.tags.get("val_digest"):
        return False
    name = "mask_AP" if "mask_AP" in current and "mask_AP" in version.tags else "AP"
    return float(current[name]) > float(version.tags.get(name, "-1"))


def _publish(client: MlflowClient, name: str, model_id: str, card: Card) -> ModelVersion:
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
    names = ("AP", "AP50", "mask_AP", "mask_AP50")
    figures: dict[str, str] = {name: f"{card.metrics[name]:.6f}" for name in names if name in card.metrics}
    return {
        "checkpoint_uri": card.checkpoint,
        "step": str(card.step),
        "epoch": f"{card.epoch:g}",
        "code_commit": card.code_commit,
        "train_digest": card.train_digest,
        "val_digest": card.val_digest,
        **figures,
    }


def find_version(client: MlflowClient, uri: str) -> Any:
    """The registered version that `models:/NAME@ALIAS` or `models:/NAME/VERSION` names."""
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


def run_of(client: MlflowClient, uri: str) -> str:
    """Id of the run that a registered version came from."""
    return str(find_version(client, uri).run_id)


def resolve(uri: str) -> Path:
    """Folder with the weights and the card of a registered version, fetched where it is not on this machine."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = connect()
    version = find_version(client, uri)
    try:
        folder = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}"))
    except (MlflowException, OSError) as error:
        raise RegistryError(
            f"the files of {uri} cannot be fetched ({first_line(error)}); expected them in the artifact store: "
            "is it mounted or reachable from here?"
        ) from None
    found = sorted(folder.rglob(CARD_NAME))
    if not found:
        raise RegistryError(f"{uri} holds no {CARD_NAME}; expected a model registered by `detr`")
    return found[0].parent
