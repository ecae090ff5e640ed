"""Registration of a run's checkpoint as a version of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Location, checkpoint_root, location
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig, from_json
from pipeline.errors import RegistryError
from pipeline.registry.against_holder import holder_if_known, note_change
from pipeline.registry.card import Card
from pipeline.registry.kept_detections import store_of_checkpoint
from pipeline.registry.pages import write_pages
from pipeline.registry.publish import Registered, check_names, publish
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import find_run, read_config
from pipeline.tracking.tags import TAG_FOLDER
from pipeline.training.model import build_trainable_model
from shards.dataset.manifest import load_manifest

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
    version with a higher AP, or PQ, on the same validation data. Raise `TrackingError` if MLflow refuses.
    """
    check_names(name, alias)
    meta = read_meta(path)
    train = load_manifest(config.data.train)
    model = build_trainable_model(config, train.num_classes)
    checkpoint_state.load_weights(path, model, averaged=meta.ema)
    card = Card(
        model=config.model,
        transform=config.transform,
        categories=train.categories,
        evaluate_batch_size=config.evaluate.batch_size,
        evaluate_batching=config.evaluate.batching,
        channels_last=config.compute.channels_last,
        tf32=config.compute.tf32,
        deterministic=config.compute.deterministic,
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
    retry_command = f"detr register {run_id} --name {name}" + (f" --alias {alias}" if alias != "best" else "")
    before = holder_if_known(client, name, alias)
    registered = publish(
        client, model, card, name=name, alias=alias, retry_command=retry_command, only_if_better=only_if_better
    )
    store_of_checkpoint(client, run_id, meta.step, path)
    note = note_change(client, before, name, registered.version, alias)
    write_pages(client, name, registered.version)
    return registered._replace(note=note)


def register_run(name_or_id: str, *, name: str, alias: str) -> Registered:
    """Publish the best checkpoint of a run, finished or not, and point `alias` at it unconditionally."""
    client = connect()
    run = find_run(client, name_or_id)
    run_id = str(run.info.run_id)
    config = from_json(read_config(client, run_id))
    found = catalog.best(checkpoint_root(config.checkpoint.store, location(run.data.tags[TAG_FOLDER])))
    if found is None:
        raise RegistryError(
            f"run {name_or_id} has no evaluated checkpoint yet; expected one: wait for its first evaluation"
        )
    path, metrics = found
    return register(client, run_id, config, path, metrics, name=name, alias=alias)
