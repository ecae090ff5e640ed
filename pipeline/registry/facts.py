"""Facts about a registered version that the store keeps: figures by data set, the run, its data and code, and parents."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig, from_json
from pipeline.errors import RegistryError, RunConfigError, TrackingError
from pipeline.figures import TAGGED
from pipeline.registry.versions import find_version
from pipeline.tracking.mlflow_runs import read_config
from pipeline.tracking.pages.data import DataSet, data_of_run
from pipeline.tracking.tags import TAG_COMMIT, TAG_INITIAL_WEIGHTS, TAG_NOTE, TAG_REPOSITORY

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_MOST_PARENTS = 20
_PREFIXES = ("val/", "evaluate/")


@dataclass(frozen=True)
class Figures:
    """COCO metrics of a version on a data set."""

    data: str
    """Name of the data set."""
    digest: str
    """First characters of its digest; empty if the figures are from a release that did not record it."""
    run_id: str
    """Run that scored the version: its training, or a run of `detr evaluate`."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class VersionFacts:
    """Facts about a version, and about the versions that its weights come from."""

    name: str
    version: str
    aliases: tuple[str, ...]
    tags: dict[str, str]
    model_id: str
    run_id: str
    run_name: str
    experiment_id: str
    commit: str
    repository: str
    config: RunConfig | None
    """Configuration of the run; None for an imported version."""
    initial_weights: str
    """Origin of the first weights, as the run recorded it."""
    data: tuple[tuple[str, DataSet], ...]
    """Data of the run, each with its use."""
    figures: tuple[Figures, ...]
    """On the validation data first, then as evaluated later."""
    parent: VersionFacts | None = None
    """Version that the run started from."""
    lost_parent: str = ""
    """Address of the version that the run started from and the registry no longer has."""

    @property
    def uri(self) -> str:
        """Address of the version."""
        return f"models:/{self.name}/{self.version}"


def facts_about(client: MlflowClient, uri: str) -> VersionFacts:
    """Return what the store knows about a version and its parents; raise `RegistryError` if there is no such version."""
    return _facts(client, uri, ())


def _facts(client: MlflowClient, uri: str, children: tuple[str, ...]) -> VersionFacts:
    """Return the facts about a version and its parents; `children` are the versions that were followed to it."""
    version = find_version(client, uri)
    line = (*children, f"models:/{version.name}/{version.version}")
    run, model_id = client.get_run(version.run_id), model_id_of(version)
    tags = {key: value for key, value in version.tags.items() if key != TAG_NOTE}
    config = _config(client, run) if "imported_from" not in tags else None
    parent, lost = None, ""
    # An older run may have recorded an alias, which can have moved since, even to a version of the run itself.
    numbered = config is not None and re.fullmatch(r"models:/.+/\d+", config.initial)
    if config and numbered and config.initial not in line and len(line) <= _MOST_PARENTS:
        try:
            parent = _facts(client, config.initial, line)
        except RegistryError:
            lost = config.initial
    return VersionFacts(
        name=str(version.name),
        version=str(version.version),
        aliases=tuple(_aliases(client, version)),
        tags=tags,
        model_id=model_id,
        run_id=str(run.info.run_id),
        run_name=str(run.info.run_name),
        experiment_id=str(run.info.experiment_id),
        commit=tags.get("code_commit") or run.data.tags.get(TAG_COMMIT, "unknown"),
        repository=run.data.tags.get(TAG_REPOSITORY, ""),
        config=config,
        initial_weights=run.data.tags.get(TAG_INITIAL_WEIGHTS, ""),
        data=tuple(data_of_run(run)),
        figures=tuple(_figures(client.get_logged_model(model_id).metrics or (), tags, run)) if model_id else (),
        parent=parent,
        lost_parent=lost,
    )


def model_id_of(version: Any) -> str:
    """Return the id of a version's logged model; empty if it was made of something else.

    The field of this name is empty over REST. The source is `models:/ID`, or the folder of the files if the version was
    made with the button on the page of the logged model.
    """
    found = re.search(r"models:?/(m-[0-9a-f]{32})(?:/|$)", str(version.source))
    return found[1] if found else ""


def _aliases(client: MlflowClient, version: Any) -> list[str]:
    known = client.get_registered_model(version.name).aliases
    return sorted(alias for alias, number in known.items() if str(number) == str(version.version))


def _config(client: MlflowClient, run: Run) -> RunConfig | None:
    try:
        return from_json(read_config(client, run.info.run_id))
    except (TrackingError, RunConfigError):  # its artifacts are not reachable from here, or are another release's
        return None


def _figures(metrics: Iterable[Metric], tags: dict[str, str], run: Run) -> list[Figures]:
    """Return the figures by data set and run; of a version of an older release, those in its tags.

    Each figure of an evaluation is the newest of its name: one by layers has no figures of masks, and hides none.
    """
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    ended: dict[tuple[str, str], dict[str, int]] = {}
    for metric in metrics:
        prefix = next((prefix for prefix in _PREFIXES if metric.key.startswith(prefix)), "")
        if not prefix:
            continue
        data, by = (metric.dataset_name or "", metric.dataset_digest or ""), metric.run_id or ""
        found.setdefault((*data, by), {})[metric.key.removeprefix(prefix)] = metric.value
        if prefix == "evaluate/":
            runs = ended.setdefault(data, {})
            runs[by] = max(runs.get(by, 0), metric.timestamp)
    trained = [key for key in found if key[2] == run.info.run_id]
    evaluated = []
    for data, runs in sorted(ended.items()):
        in_order = sorted(runs, key=lambda by: (runs[by], by))
        merged = {name: value for by in in_order for name, value in found[(*data, by)].items()}
        evaluated.append(Figures(*data, in_order[-1], merged))
    if not trained:
        figures: dict[str, float] = {name: float(tags[name]) for name in TAGGED if name in tags}
        first = [Figures("", tags.get("val_digest", "")[:36], run.info.run_id, figures)] if figures else []
    else:
        first = [Figures(*key, metrics=found[key]) for key in trained]
    return first + evaluated
