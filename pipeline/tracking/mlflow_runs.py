"""Runs in an MLflow store: create, find and read them, and set their final status.

The driver creates the run and sets its status; workers send events to the run by its id (`start_run` would unset the id
and could mark a shared run as finished). The default store is SQLite in the working folder; a tracking URI in
`MLFLOW_TRACKING_URI` takes precedence, as everywhere in MLflow.
"""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.config import RunConfig, from_json, to_json
from pipeline.errors import RunConfigError, TrackingError
from pipeline.tracking.mlflow_client import tracking_uri, unavailable
from pipeline.tracking.pages.data import DataSet, dataset_input
from pipeline.tracking.pages.experiment import complete_experiment
from pipeline.tracking.pages.parameters import parameters
from pipeline.tracking.pages.writer import write_description
from pipeline.tracking.provenance import code_commit, repository
from pipeline.tracking.server.answers import reason
from pipeline.tracking.tags import TAG_COMMIT, TAG_FOLDER, TAG_KEY, TAG_PHASE, TAG_REPOSITORY
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


CONFIG_ARTIFACT = "config.json"
_MAX_PARAMS = 100  # MLflow's largest number of parameters in one request
_PAGE = 1000  # runs fetched in one request


def experiment_id(client: MlflowClient, name: str) -> str:
    """Return the id of an experiment; create it if needed, without a server with artifacts beside the database."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise TrackingError(f"the experiment {name!r} is deleted; restore it or choose --track.experiment NAME")
        return str(found.experiment_id)
    uri = tracking_uri()
    artifacts = None
    if uri.startswith("sqlite:///"):
        folder = Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts"
        artifacts = f"{folder.as_uri()}/{name}"
    # Without this tag the UI opens the experiment as a view of language-model traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifact_location=artifacts, tags=tags))


def create_run(
    client: MlflowClient, config: RunConfig, datasets: Mapping[str, DataSet], tags: Mapping[str, str]
) -> str:
    """Create a run with its configuration, code and data; return its id.

    `datasets` maps a context ("training", "validation") to its data. If a run has the same `TAG_KEY`, a driver was
    killed while it created it, and what is missing is added.
    """
    from mlflow.entities import Param

    experiment = experiment_id(client, config.track.experiment)
    complete_experiment(client, experiment, client.get_experiment(experiment).tags)
    run_id = run_with_key(client, config, tags[TAG_KEY]) if TAG_KEY in tags else ""
    if not run_id:
        all_tags = {**origin_tags(f"detr train {config.recipe}"), **tags}
        run = client.create_run(experiment, run_name=config.run_name, tags=all_tags)
        run_id = str(run.info.run_id)
        logged: Mapping[str, str] = {}
    else:
        logged = client.get_run(run_id).data.params  # which MLflow lets nobody change
        client.update_run(run_id, status="RUNNING")
    missing = [Param(name, value) for name, value in parameters(config).items() if name not in logged]
    for start in range(0, len(missing), _MAX_PARAMS):
        client.log_batch(run_id, params=missing[start : start + _MAX_PARAMS])
    client.log_text(run_id, to_json(config).decode(), CONFIG_ARTIFACT)
    client.log_inputs(run_id, [dataset_input(context, dataset) for context, dataset in datasets.items()])
    return run_id


def run_with_key(client: MlflowClient, config: RunConfig, key: str) -> str:
    """Return the id of the run with this key in its record, or an empty text."""
    experiment = experiment_id(client, config.track.experiment)
    found = client.search_runs([experiment], f"tags.`{TAG_KEY}` = '{key}'", max_results=1)
    return str(found[0].info.run_id) if found else ""


def folder_of_other(client: MlflowClient, name: str, folder: str) -> str:
    """Return where another run lies whose key is this name, the newest if there are several; empty if there is none."""
    for run in _runs(client, condition=f"attributes.run_name = '{name}' and tags.`{TAG_KEY}` != ''"):
        other = str(run.data.tags[TAG_FOLDER])
        if other != folder and other.rpartition("/")[2] == name:
            return other
    return ""


def origin_tags(command: str) -> dict[str, str]:
    """Return MLflow's tags for the source of a run, which its client does not set: command, user, commit, repository."""
    address = repository()
    return {
        "mlflow.source.name": command,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": user_name(),
        TAG_COMMIT: code_commit(),
        **({TAG_REPOSITORY: address} if address else {}),
    }


def user_name() -> str:
    """Return the name of the user, or the number of a user without a name, as containers may have."""
    try:
        return os.environ.get("USER") or getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def read_config(client: MlflowClient, run_id: str) -> bytes:
    """Return the configuration of a run as JSON; raise `TrackingError` if the run has none.

    A run from before the option `evaluate.batching` keeps the padded batches that it was evaluated in.
    """
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            stored = Path(client.download_artifacts(run_id, CONFIG_ARTIFACT, folder)).read_bytes()
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"run {run_id} has no {CONFIG_ARTIFACT} ({one_line(error)}); expected a run of `detr train`"
            ) from None
    config: dict[str, Any] = msgspec.json.decode(stored)
    if "evaluate" in config:
        config["evaluate"].setdefault("batching", "padded")
    return msgspec.json.encode(config)


def run_config(client: MlflowClient, run_id: str) -> RunConfig:
    """Return the configuration that a run trains with; raise as `read_config`, and `RunConfigError` for another's."""
    return from_json(read_config(client, run_id))


def find_runs(client: MlflowClient, experiment: str | None = None, limit: int = 50) -> list[Run]:
    """Return the newest runs of `detr train`, of one experiment or of all."""
    return list(islice(_runs(client, experiment), limit))


def runs_where(client: MlflowClient, condition: str, limit: int) -> list[Run]:
    """Return the newest runs of `detr train` that meet a condition in MLflow's filter language."""
    return list(islice(_runs(client, condition=condition), limit))


def _runs(client: MlflowClient, experiment: str | None = None, condition: str = "") -> Iterator[Run]:
    """Yield the runs of `detr train` that meet a condition, newest first; the server filters and pages them."""
    experiments = client.search_experiments()
    ids = [found.experiment_id for found in experiments if experiment in (None, found.name)]
    token: str | None = None
    while ids:
        page = client.search_runs(
            ids,
            filter_string=f"tags.`{TAG_FOLDER}` != ''" + (f" and {condition}" if condition else ""),
            max_results=_PAGE,
            order_by=["start_time DESC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def find_run(client: MlflowClient, name_or_id: str) -> Run:
    """Return the run with this id, name or start of an id (4 characters or more), the newest if there are several.

    Raise `TrackingError` if there is none.
    """
    conditions = []
    if re.fullmatch(r"[0-9a-f]{4,32}", name_or_id):
        conditions.append(f"attributes.run_id LIKE '{name_or_id}%'")
    quotes = [quote for quote in "'\"" if quote not in name_or_id]  # MLflow's filters have no escapes
    if name_or_id and quotes:
        conditions.append(f"attributes.run_name = {quotes[0]}{name_or_id}{quotes[0]}")
    found = [run for condition in conditions for run in islice(_runs(client, condition=condition), 1)]
    if found:
        return max(found, key=lambda run: run.info.start_time or 0)
    names = list(dict.fromkeys(str(run.info.run_name) for run in find_runs(client)))
    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"
    raise TrackingError(
        f"there is no run {name_or_id!r}; expected a run's id or name (newest: {known}): see `detr runs`"
    )


def set_final_status(client: MlflowClient, run_id: str, phase: str, status: str, warn: Callable[[str], None]) -> bool:
    """Set phase, status and description of a run that has ended, and return whether that succeeded.

    On failure only `warn`, to not hide why the run ended.
    """
    try:
        client.set_tag(run_id, TAG_PHASE, phase)
        client.set_terminated(run_id, status)
        with suppress(TrackingError, RunConfigError):  # a run without a configuration has no description
            write_description(client, run_id, run_config(client, run_id))
    except unavailable() as error:
        warn(
            f"warning: could not set the run's status in MLflow to {phase} ({reason(error)}); `detr sync {run_id}` does"
        )
        return False
    return True
