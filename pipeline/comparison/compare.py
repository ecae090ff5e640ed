"""Comparison of two sides by kept detections; a version that has none is evaluated if its data is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.comparison.models import KeptOfModel, Model, find_models, model_of_version
from pipeline.errors import RegistryError
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.evaluation.kept import Kept, decided_by, difference_of, keep
from pipeline.registry.kept_detections import store
from pipeline.registry.versions import find_version
from pipeline.tracking.mlflow_client import connect, translated_errors
from shards.dataset.manifest import Manifest, load_manifest
from shards.errors import ShardError, one_line
from shards.score.difference import Difference

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Comparison:
    """Difference of two sides, and what was compared."""

    before: tuple[str, ...]
    """Names of the models of the first side."""
    after: tuple[str, ...]
    data: str
    """Name of the data set."""
    url: str
    digest: str
    decided_by: str
    """Figure that decides, and the reason if it is not the one by which `@best` is chosen."""
    difference: Difference


def compare(before: str, after: str, data: str | None = None, *, progress: bool = False) -> Comparison:
    """Return the difference between two sides, each of a model or of several; see `find_models`.

    data: folder or URL of the data set; by default the one that all were evaluated on.
    """
    client = connect()
    with translated_errors():
        return compare_models(client, find_models(client, before), find_models(client, after), data, progress=progress)


def compare_models(
    client: MlflowClient,
    before: Sequence[Model],
    after: Sequence[Model],
    data: str | None = None,
    *,
    progress: bool = False,
) -> Comparison:
    """Do the same as `compare` for models."""
    models = [*before, *after]
    known = [KeptOfModel(client, model) for model in models]
    manifest = load_manifest(data) if data else _common_data(models, known)
    kept = [
        _kept_on(client, model, of_model, manifest, evaluated=data, progress=progress)
        for model, of_model in zip(models, known, strict=True)
    ]
    difference = difference_of(manifest, kept[: len(before)], kept[len(before) :])
    return Comparison(
        before=tuple(model.name for model in before),
        after=tuple(model.name for model in after),
        data=manifest.name,
        url=manifest.url,
        digest=manifest.digest,
        decided_by=decided_by(difference.deciding.name, manifest, [model.name for model in models], kept),
        difference=difference,
    )


def _common_data(models: Sequence[Model], known: Sequence[KeptOfModel]) -> Manifest:
    """Return the data set that detections of all models are kept on: of several, the one they were validated on."""
    for model, of_model in zip(models, known, strict=True):
        if not of_model.digests:
            raise _not_kept(model, "any data set")
    common = [digest for digest in known[0].digests if all(digest in other.digests for other in known)]
    if not common:
        shown = "; ".join(
            f"{model.name} on {', '.join(found[:8] for found in of_model.digests)}"
            for model, of_model in zip(models, known, strict=True)
        )
        raise RegistryError(
            f"the models were evaluated on different data (digests: {shown}), whose figures cannot be compared; expected "
            "the same data: give --data URL, which evaluates each on it"
        )
    validated = list(dict.fromkeys(of_model.validation for of_model in known if of_model.validation in common))
    choices = validated or common
    if len(choices) > 1:  # some may be training data, where a figure proves nothing
        raise RegistryError(
            f"the models were all evaluated on {len(choices)} data sets (digests: {', '.join(found[:8] for found in choices)}); "
            "expected one, or one that they were validated on: give --data URL"
        )
    kept = known[0].on(choices[0])
    assert kept is not None  # it is one of its digests
    try:
        manifest = load_manifest(kept.data)
    except (ShardError, OSError) as error:
        raise RegistryError(
            f"the data that the models were evaluated on cannot be read from {kept.data} ({one_line(error)}); expected it "
            "there: give --data URL with the same data"
        ) from None
    if manifest.digest != kept.digest:
        raise RegistryError(
            f"{kept.data} is not the data any more that the models were evaluated on (digest {kept.digest[:12]}, now "
            f"{manifest.digest[:12]}); expected the same: give --data URL"
        )
    return manifest


def _kept_on(
    client: MlflowClient,
    model: Model,
    known: KeptOfModel,
    manifest: Manifest,
    *,
    evaluated: str | None,
    progress: bool,
) -> Kept:
    """Return the detections of a model on a data set, from a forward pass over `evaluated` if they were not kept."""
    kept = known.on(manifest.digest)
    if kept is not None and (evaluated is None or len(kept.image_ids) == manifest.images):
        return kept
    if not (model.uri and evaluated):
        of_images = "" if kept is None else f"all {manifest.images:,} images of "
        raise _not_kept(model, of_images + manifest.url)
    from pipeline.inference.evaluate import evaluate

    kept = keep(manifest, evaluate(model.uri, evaluated, progress=progress))
    store(client, model.run_id, model.step, kept)
    return kept


def _not_kept(model: Model, data: str) -> RegistryError:
    if model.uri:
        remedy = "give --data URL, which evaluates it"
    else:
        remedy = f"`detr register {model.name} --name NAME` makes a version, which --data URL evaluates"
    return RegistryError(
        f"no detections of {model.name} on {data} were kept; expected those of an evaluation: {remedy}"
    )


def keep_detections(uri: str, data: str, evaluation: Evaluation) -> str:
    """Keep the detections of an evaluation of a version with its run; return a warning, empty if that succeeded."""
    try:
        client = connect()
        with translated_errors():
            model = model_of_version(find_version(client, uri))
            store(client, model.run_id, model.step, keep(load_manifest(data), evaluation))
    except Exception as error:  # the client and the store behind it may raise anything
        return f"warning: the detections are not kept in MLflow ({one_line(error)}); `detr compare` will need --data"
    return ""
