"""Data sets of a run, as its page and the drawer of a data set in MLflow show them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING, Any

import msgspec

from shards.dataset.contents import contents
from shards.dataset.manifest import Manifest
from shards.source.corrections import kept_corrections

if TYPE_CHECKING:
    from mlflow.entities import Run

_DIGITS = 36  # MLflow's longest digest; a tag of the run has the whole one
_COLUMNS = "mlflow_colspec"
_MOST_BYTES = 1_048_000  # of all columns: MLflow's longest schema has 1,048,575, and refuses the run for a longer one
_DIGESTS = ("digest", "source_digest", "corrections_digest")


class ClassCount(msgspec.Struct, frozen=True):
    """Number of objects of a class, crowd regions left out, and of images with any of them."""

    name: str
    objects: int
    images: int


class DataSet(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about a data set."""

    name: str
    digest: str
    """Digest of its manifest."""
    url: str
    images: int = 0
    objects: int = 0
    """Number of annotations."""
    classes: int = 0
    source_digest: str = ""
    """Digest of the annotations that it was made from, before corrections."""
    corrections_digest: str = ""
    corrections: dict[str, int] = {}
    """Number of applied corrections by action."""
    by_class: tuple[ClassCount, ...] = ()
    """Classes in the order of their ids."""

    def __str__(self) -> str:
        counts = f"{self.images:,} images, {self.objects:,} objects, {self.classes} classes" if self.images else ""
        return ", ".join(filter(None, [self.name, counts]))


def data_set(manifest: Manifest) -> DataSet:
    """Return the facts about a data set, for which its index is read."""
    classes = contents(manifest).classes
    return DataSet(
        name=manifest.name,
        digest=manifest.digest,
        url=manifest.url,
        images=manifest.images,
        objects=manifest.annotations,
        classes=manifest.num_classes,
        source_digest=manifest.annotations_digest,
        corrections_digest=manifest.corrections_digest,
        corrections=kept_corrections(manifest),
        by_class=tuple(map(ClassCount, classes.names, classes.counts.tolist(), classes.images.tolist())),
    )


def dataset_input(context: str, data: DataSet) -> Any:
    """Return MLflow's record of data used for `context`, such as `training`; its drawer lists the classes as columns."""
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = resolve_dataset_source(data.url)
    profile = {
        "images": data.images,
        "objects": data.objects,
        "classes": data.classes,
        **{name: _halves(getattr(data, name)) for name in _DIGESTS},
        "corrections": data.corrections,
    }
    columns = _columns(data.by_class)
    entity = Dataset(
        name=data.name,
        digest=data.digest[:_DIGITS],
        source_type=source._get_source_type(),
        source=source.to_json(),
        schema=msgspec.json.encode({_COLUMNS: columns}).decode() if columns else None,
        profile=msgspec.json.encode({name: value for name, value in profile.items() if value}).decode(),
    )
    return DatasetInput(dataset=entity, tags=[InputTag("mlflow.data.context", context)])


def _columns(classes: Sequence[ClassCount]) -> list[dict[str, Any]]:
    """Return the classes as columns in their order; of more than MLflow takes, the most frequent and the number of others."""
    columns: list[dict[str, Any]] = [
        {"name": entry.name, "type": f"{entry.objects:,} in {entry.images:,} images", "counts": entry}
        for entry in classes
    ]
    by_frequency = sorted(range(len(classes)), key=lambda number: -classes[number].objects)
    sizes = accumulate(len(msgspec.json.encode(columns[number])) + 1 for number in by_frequency)
    taken = sum(1 for _ in takewhile(lambda size: size <= _MOST_BYTES, sizes))
    kept = [columns[number] for number in sorted(by_frequency[:taken])]
    left_out = len(columns) - taken
    return [*kept, {"name": f"{left_out:,} more classes", "type": "less frequent"}] if left_out else kept


def data_of_run(run: Run) -> Iterator[tuple[str, DataSet]]:
    """Yield each use of data by a run, `training` first, and the facts about the data."""
    found = []
    for entry in run.inputs.dataset_inputs:
        tags = {tag.key: tag.value for tag in entry.tags}
        profile = _decoded(entry.dataset.profile)
        known = {name: value for name, value in profile.items() if name in DataSet.__struct_fields__}
        known |= {name: str(known[name]).replace(" ", "") for name in _DIGESTS if name in known}
        facts = {"digest": entry.dataset.digest, **known, "by_class": _by_class(entry.dataset.schema)}
        url = str(_decoded(entry.dataset.source).get("uri", ""))
        found.append((tags.get("mlflow.data.context", "data"), DataSet(name=entry.dataset.name, url=url, **facts)))
    yield from sorted(found, key=lambda entry: entry[0] != "training")


def _halves(digest: str) -> str:
    """Return a digest with a blank in the middle, where the drawer of MLflow breaks the line instead of cutting it."""
    return f"{digest[:32]} {digest[32:]}".strip()


def metric_data(run: Run, use: str) -> dict[str, str]:
    """Return MLflow's fields for metrics on the data that a run uses for `use`; none if it has no such data."""
    found: dict[str, str] = {}
    for entry in run.inputs.dataset_inputs:  # the last counts: a run may continue on other data
        if any((tag.key, tag.value) == ("mlflow.data.context", use) for tag in entry.tags):
            found = {"dataset_name": entry.dataset.name, "dataset_digest": entry.dataset.digest}
    return found


def _by_class(schema: str | None) -> tuple[ClassCount, ...]:
    columns = _decoded(schema).get(_COLUMNS, [])
    counts = [column.get("counts") for column in columns if isinstance(column, dict)]
    return msgspec.convert([count for count in counts if count], tuple[ClassCount, ...])


def _decoded(text: str | None) -> dict[str, Any]:
    """Return the JSON object in a text; empty for anything else, such as what another program has logged."""
    try:
        content = msgspec.json.decode(text or "{}")
    except msgspec.DecodeError:
        return {}
    return content if isinstance(content, dict) else {}
