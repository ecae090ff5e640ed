"""A run in an MLflow store: created, found and read; what happens in it is sent by `pipeline/mlflow_events.py`.

The driver creates the run and sets its final status; workers send events to the run by its id (`start_run` would unset
the id and could mark a shared run as finished). SQLite in the working folder is the default store; a tracking URI in
`MLFLOW_TRACKING_URI` takes precedence, as everywhere in MLflow.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec

from pipeline.config import RunConfig, flatten, to_json
from pipeline.errors import TrackingError, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CONFIG_ARTIFACT = "config.json"
TAG_FOLDER = "detr.folder"
TAG_TOTAL_STEPS = "detr.total_steps"
TAG_EPOCHS = "detr.epochs"
TAG_TRAIN_DIGEST = "detr.train_digest"
TAG_STREAM = "detr.stream_changes"
TAG_IMPORTED = "detr.imported_from"
TAG_COMMIT = "mlflow.source.git.commit"
_MAX_PARAMS = 100  # MLflow's largest number of parameters in one request
_PAGE = 1000  # runs fetched at once


def tracking_uri() -> str:
    """The store in use, absolute so that workers elsewhere on this machine mean the same one."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


@contextmanager
def answering(remedy: str = "check MLFLOW_TRACKING_URI and the server, then try again") -> Iterator[None]:
    """Raises `TrackingError`, one line, where MLflow does not answer inside the block, or refuses."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        uri = tracking_uri()
        raise TrackingError(
            f"the MLflow store {without_secret(uri)} did not do as it was asked ({_reason(error, uri)}); {remedy}"
        ) from error


def connect(uri: str | None = None) -> MlflowClient:
    """A client of the store. Short retries: the spool is what survives an outage, not a blocked call.

    Raises `TrackingError` when the store does not answer.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Creating the SQLite schema prints a hundred lines of migrations at level INFO.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = uri or tracking_uri()
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI") or uri)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, ImportError) as error:  # a database's driver may be missing
        raise TrackingError(
            f"the MLflow store {without_secret(uri)} does not answer ({_reason(error, uri)}); "
            "expected a running server or a database: check MLFLOW_TRACKING_URI"
        ) from None
    return client


def without_secret(uri: str) -> str:
    """The address with user, password and query masked, for people's eyes.

    Not `urllib.parse.urlsplit`: databases take passwords with a slash in, which it counts as the path.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    place, mark, query = _split_query(rest)
    if "@" in query:
        return f"{scheme}://***"  # a password with a question mark in, or one in the query: nothing here is safe
    if "@" in place and not place.startswith("/"):
        place = f"***@{place.rpartition('@')[2]}"
    return f"{scheme}://{place}{mark}{'***' if query else ''}"


def holds_secret(uri: str) -> bool:
    """Whether the address names a user or a password, before its host or in its query."""
    place, _, query = _split_query(uri.partition("://")[2])
    return (
        "@" in query
        or ("@" in place and not place.startswith("/"))
        or bool(re.search(r"pass|pwd|secret|token|key|credential", unquote(query), re.IGNORECASE))
    )


def _split_query(rest: str) -> tuple[str, str, str]:
    found = re.search("[?#]", rest)
    return (rest, "", "") if found is None else (rest[: found.start()], found[0], rest[found.end() :])


def _reason(error: Exception, uri: str) -> str:
    """What an error says. MLflow repeats the address in its messages, a driver perhaps a part of it."""
    said, shown = first_line(error).replace(uri, without_secret(uri)), without_secret(uri)
    hidden = [part for part in re.split(r"[/:@?&=;#]+", uri) if len(part) > 2 and part not in shown]
    return type(error).__name__ if any(part in said or unquote(part) in said for part in hidden) else said


def code_commit() -> str:
    """Git commit of this code, with `-dirty` when the tree differs from it; `unknown` outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def experiment_id(client: MlflowClient, name: str) -> str:
    """The experiment's id, created when new; its artifacts lie beside the database where there is no server."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            raise TrackingError(f"the experiment {name!r} is deleted; restore it or choose --track.experiment NAME")
        return str(found.experiment_id)
    uri = tracking_uri()
    beside = None
    if uri.startswith("sqlite:///"):
        beside = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
    # Without this tag the UI opens the experiment as one of language-model traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifact_location=beside and f"{beside}/{name}", tags=tags))


def create_run(
    client: MlflowClient, config: RunConfig, datasets: Mapping[str, tuple[str, str, str]], tags: Mapping[str, str]
) -> str:
    """Create the run with its configuration, code and data; return its id.

    datasets: context ("training", "validation") -> (name, digest, url).
    """
    run = client.create_run(
        experiment_id(client, config.track.experiment),
        run_name=config.run_name,
        tags={**origin_tags(f"detr train {config.recipe}"), **tags},
    )
    run_id = str(run.info.run_id)
    from mlflow.entities import Param

    parameters = [Param(name, value or "-") for name, value in flatten(config).items()]
    for start in range(0, len(parameters), _MAX_PARAMS):
        client.log_batch(run_id, params=parameters[start : start + _MAX_PARAMS])
    client.log_text(run_id, to_json(config).decode(), CONFIG_ARTIFACT)
    client.log_inputs(run_id, [_dataset_input(context, *said) for context, said in datasets.items()])
    return run_id


def origin_tags(command: str) -> dict[str, str]:
    """Who and what made a run; MLflow's client does not add them by itself."""
    import getpass

    return {
        "mlflow.source.name": command,
        "mlflow.source.type": "LOCAL",
        "mlflow.user": os.environ.get("USER") or getpass.getuser(),
        TAG_COMMIT: code_commit(),
    }


def _dataset_input(context: str, name: str, digest: str, url: str) -> Any:
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    source = resolve_dataset_source(url)
    # MLflow bounds a digest at 36 characters; the tag on the run holds it whole.
    dataset = MetaDataset(source=source, name=name, digest=digest[:36])
    return DatasetInput(dataset=dataset._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", context)])


def read_config(client: MlflowClient, run_id: str) -> bytes:
    """The configuration artifact of a run, as `pipeline.config.to_json` wrote it.

    Runs of before `evaluate.batching` were evaluated in padded batches, and stay what they are.
    """
    import tempfile

    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            stored = Path(client.download_artifacts(run_id, CONFIG_ARTIFACT, folder)).read_bytes()
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"run {run_id} has no {CONFIG_ARTIFACT} ({first_line(error)}); expected a run of `detr train`"
            ) from None
    config: dict[str, Any] = msgspec.json.decode(stored)
    if "evaluate" in config:
        config["evaluate"].setdefault("batching", "padded")
    return msgspec.json.encode(config)


def find_runs(client: MlflowClient, experiment: str | None = None, limit: int = 50) -> list[Run]:
    """The newest runs of `detr train`, of one experiment or of all."""
    return list(islice(_runs(client, experiment), limit))


def _runs(client: MlflowClient, experiment: str | None = None) -> Iterator[Run]:
    """All runs of `detr train`, the newest first, fetched page by page. The server filters: there may be many others."""
    ids = [e.experiment_id for e in client.search_experiments() if experiment is None or e.name == experiment]
    token: str | None = None
    while ids:
        page = client.search_runs(
            ids,
            filter_string=f"tags.`{TAG_FOLDER}` != ''",
            max_results=_PAGE,
            order_by=["start_time DESC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def find_run(client: MlflowClient, name_or_id: str) -> Run:
    """The run with this id, the start of an id (4 characters or more), or this name; the newest of several of a name."""
    from mlflow.exceptions import MlflowException

    if re.fullmatch(r"[0-9a-f]{32}", name_or_id):
        with suppress(MlflowException):  # it may be a name all the same
            run = client.get_run(name_or_id)
            if TAG_FOLDER in run.data.tags:
                return run
    names: list[str] = []
    for run in _runs(client):
        if run.info.run_name == name_or_id or (len(name_or_id) >= 4 and run.info.run_id.startswith(name_or_id)):
            return run
        names.append(str(run.info.run_name))
    newest = list(dict.fromkeys(names))
    known = ", ".join(newest[:20]) + (", ..." if len(newest) > 20 else "") or "none"
    raise TrackingError(
        f"there is no run {name_or_id!r}; expected a run's id or name (known: {known}): see `detr runs`"
    )
