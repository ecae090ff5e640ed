"""Models to compare, by what a user names: versions, runs, and groups of runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location, checkpoint_root, location
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import from_json
from pipeline.errors import CheckpointError, RegistryError
from pipeline.evaluation.kept import Kept, read_beside
from pipeline.figures import deciding_name
from pipeline.registry.kept_detections import fetch, short_digest, stored
from pipeline.registry.versions import find_version
from pipeline.tracking.mlflow_runs import find_run, find_runs, read_config
from pipeline.tracking.tags import TAG_FOLDER, TAG_VAL_DIGEST
from shards.errors import ShardError

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MOST_RUNS = 10_000  # looked at for a pattern


@dataclass(frozen=True)
class Model:
    """A version, or the best checkpoint of a run."""

    name: str
    """Name for people."""
    run_id: str
    step: int
    uri: str = ""
    """Address of a version of this step, by which it can be evaluated; empty if none is registered."""
    checkpoint: Location | None = None
    """Checkpoint of a run."""
    val_digest: str = ""
    """Digest of the data that its run validated on; empty if that is not recorded."""


def find_models(client: MlflowClient, text: str) -> list[Model]:
    """Return the models of a side: versions and runs with commas between them, or runs by a pattern with `*`."""
    found = [model for name in text.split(",") if name.strip() for model in _find(client, name.strip())]
    if not found:
        raise RegistryError(f"got {text!r} to compare; expected models:/NAME/VERSION, models:/NAME@ALIAS or a run")
    return found


def _find(client: MlflowClient, text: str) -> Iterator[Model]:
    if text.startswith("models:/"):
        yield model_of_version(find_version(client, text))
    elif "*" in text:
        runs = [run for run in find_runs(client, limit=_MOST_RUNS) if fnmatchcase(str(run.info.run_name), text)]
        if not runs:
            raise RegistryError(f"no run has a name like {text!r}; expected a pattern of names that `detr runs` lists")
        yield from (_of_run(client, run) for run in sorted(runs, key=lambda run: str(run.info.run_name)))
    else:
        yield _of_run(client, find_run(client, text))


def model_of_version(version: Any) -> Model:
    """Return the model of a registered version."""
    uri = f"models:/{version.name}/{version.version}"
    val_digest = version.tags.get("val_digest", "")
    return Model(uri, str(version.run_id), int(version.tags.get("step", 0)), uri, val_digest=val_digest)


def _of_run(client: MlflowClient, run: Any) -> Model:
    """Return the best checkpoint of a run, or its best version where its checkpoints cannot be seen from here."""
    run_id, name = str(run.info.run_id), str(run.info.run_name)
    versions = list(client.search_model_versions(f"run_id = '{run_id}'"))
    best, val_digest = _best_checkpoint(client, run), run.data.tags.get(TAG_VAL_DIGEST, "")
    if best is not None:
        path, step = best
        uris = [f"models:/{version.name}/{version.version}" for version in versions if _step(version) == step]
        return Model(name, run_id, step, uris[0] if uris else "", path, val_digest)
    if not versions:
        raise RegistryError(
            f"run {name} has no evaluated checkpoint that can be seen from here, and no registered version; expected one "
            "of them: wait for its first evaluation, or go where its storage is mounted"
        )
    deciding = deciding_name(*(version.tags for version in versions))
    version = max(versions, key=lambda found: float(found.tags.get(deciding, "-1")))
    return replace(model_of_version(version), name=name)


def _best_checkpoint(client: MlflowClient, run: Any) -> tuple[Location, int] | None:
    config = from_json(read_config(client, str(run.info.run_id)))
    try:
        found = catalog.best(checkpoint_root(config.checkpoint.store, location(run.data.tags[TAG_FOLDER])))
        return None if found is None else (found[0], read_meta(found[0]).step)
    except (OSError, ShardError, CheckpointError):
        return None  # its storage is not reachable from here


def _step(version: Any) -> int:
    return int(version.tags.get("step", 0))


class KeptOfModel:
    """Detections of a model that were kept, by data set."""

    def __init__(self, client: MlflowClient, model: Model) -> None:
        self._client, self._model = client, model
        self._files = stored(client, model.run_id, model.step)
        self._beside = None if model.checkpoint is None else read_beside(model.checkpoint)

    @property
    def validation(self) -> str:
        """First digits of the digest of the data that the model's run validated on; empty if that is not known."""
        return short_digest(self._model.val_digest if self._beside is None else self._beside.digest)

    @property
    def digests(self) -> list[str]:
        """First digits of the digests of the data sets."""
        beside = [] if self._beside is None else [short_digest(self._beside.digest)]
        return [*beside, *(digest for digest in self._files if digest not in beside)]

    def on(self, digest: str) -> Kept | None:
        """Return the detections on the data set of this digest or these first digits of it.

        MLflow's file comes before the one beside the checkpoint: a later evaluation of the version, perhaps on more
        images than the run's, is in MLflow only.
        """
        short = short_digest(digest)
        if short in self._files:
            return fetch(self._client, self._model.run_id, self._files[short])
        return self._beside if self._beside is not None and short_digest(self._beside.digest) == short else None
