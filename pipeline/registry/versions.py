"""Model registry: register a checkpoint as a version, and find a version again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import checkpoint
from pipeline.checkpoint_store import Location, home_of
from pipeline.config import RunConfig
from pipeline.errors import RegistryError, first_line
from pipeline.mlflow_store import connect, find_run
from pipeline.predict import CARD_NAME, Card
from pipeline.publish import Registered, check_names, publish

if TYPE_CHECKING:
    from mlflow import MlflowClient


def register(
    client: MlflowClient,
    run_id: str,
    config: RunConfig,
    path: Location,
    metrics: Mapping[str, float],
    *,
    name: str,
    alias: str,
    only_if_better: bool = False,
) -> Registered:
    """Publish the checkpoint at `path` as a version of `name` and point `alias` at it.

    A step of a run is published once; publishing it again finds that version. With `only_if_better`, the alias stays on a
    version with a higher AP on the same validation data. Raise `TrackingError` if MLflow refuses.
    """
    from pipeline.weights import build_trained
    from shards.manifest import load_manifest

    check_names(name, alias)
    meta = checkpoint.read_meta(path)
    train = load_manifest(config.data.train)
    model = build_trained(config, train.num_classes)
    checkpoint.load_weights(path, model, averaged=meta.ema)
    card = Card(
        model=config.model,
        transform=config.transform,
        categories=train.categories,
        evaluate_batch_size=config.evaluate.batch_size,
        evaluate_batching=config.evaluate.batching,
        channels_last=config.compute.channels_last,
        ema=config.optim.ema,
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
    again = f"detr register {run_id} --name {name}" + (f" --alias {alias}" if alias != "best" else "")
    return publish(client, model, card, name=name, alias=alias, again=again, only_if_better=only_if_better)


def register_run(name_or_id: str, *, name: str, alias: str) -> Registered:
    """Publish the best checkpoint of a run, finished or not, and point `alias` at it unconditionally."""
    from pipeline.config import from_json
    from pipeline.mlflow_store import TAG_FOLDER, read_config

    client = connect()
    run = find_run(client, name_or_id)
    run_id = str(run.info.run_id)
    config = from_json(read_config(client, run_id))
    found = checkpoint.best(home_of(config.checkpoint.store, Path(run.data.tags[TAG_FOLDER])))
    if found is None:
        raise RegistryError(
            f"run {name_or_id} has no evaluated checkpoint yet; expected one: wait for its first evaluation"
        )
    path, metrics = found
    return register(client, run_id, config, path, metrics, name=name, alias=alias)


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


def resolve(uri: str) -> Path:
    """Return the folder with weights and card of a registered version; download it if needed."""
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
