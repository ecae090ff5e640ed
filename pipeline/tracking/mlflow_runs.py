"""Runs in an MLflow store: create, find and read them, and set their final status.

The driver creates the run and sets its status; workers send events to the run by its id (`start_run` would unset the id
and could mark a shared run as finished). The default store is SQLite in the working folder; a tracking URI in
`MLFLOW_TRACKING_URI` takes precedence, as everywhere in MLflow.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import msgspec

from pipeline.config import RunConfig, flatten, to_json
from pipeline.errors import TrackingError, first_line
from pipeline.track import TAG_PHASE

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
_PAGE = 1000  # runs fetched in one request


def tracking_uri() -> str:
    """Return the address of the store; paths are absolute, because workers have other working folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


@contextmanager
def answering(remedy: str = "check MLFLOW_TRACKING_URI and the server, then try again") -> Iterator[None]:
    """Raise a one-line `TrackingError` for an MLflow error in the block."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        uri = tracking_uri()
        raise TrackingError(
            f"the MLflow store {without_secret(uri)} failed ({_reason(error, uri)}); {remedy}"
        ) from error


def connect(uri: str | None = None) -> MlflowClient:
    """Return a client of the store; raise `TrackingError` if the store does not answer.

    Retries are short: the spool bridges an outage, not a blocked call.
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


def unavailable() -> tuple[type[Exception], ...]:
    """Return the errors of a store that does not answer; a function, because importing MLflow is slow."""
    from mlflow.exceptions import MlflowException

    return MlflowException, OSError


# SQLAlchemy's `make_url(uri).render_as_string(hide_password=True)` is not enough for the functions below: it shows
# passwords in the query (`?password=`, `?odbc_connect=`), a token in place of the user, and the rest of a password
# after an "@". `urllib.parse.urlsplit` takes a password with a slash as the path.
def without_secret(uri: str) -> str:
    """Return the address for messages, with user, password and query masked."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return uri
    address, mark, query = _split_query(rest)
    if "@" in query:
        return f"{scheme}://***"  # the password has a question mark, or the query a password: nothing is safe to show
    if _has_user(address):
        address = f"***@{address.rpartition('@')[2]}"
    return f"{scheme}://{address}{mark}{'***' if query else ''}"


def holds_secret(uri: str) -> bool:
    """Return whether the address has a user or a password, before its host or in its query."""
    address, _, query = _split_query(uri.partition("://")[2])
    if "@" in query or _has_user(address):
        return True
    return bool(re.search(r"pass|pwd|secret|token|key|credential", unquote(query), re.IGNORECASE))


def _has_user(address: str) -> bool:
    """Return whether an address without its scheme has a user; an "@" in the path of a SQLite file is none."""
    return "@" in address and not address.startswith("/")


def _split_query(rest: str) -> tuple[str, str, str]:
    """Return what precedes the query or fragment, the mark `?` or `#`, and what follows it."""
    found = re.search("[?#]", rest)
    return (rest, "", "") if found is None else (rest[: found.start()], found[0], rest[found.end() :])


def _reason(error: Exception, uri: str) -> str:
    """Return an error's first line without the secrets of `uri`, which MLflow and drivers may repeat."""
    shown = without_secret(uri)
    message = first_line(error).replace(uri, shown)
    pieces = [piece for piece in re.split(r"[/:@?&=;#]+", uri) if len(piece) > 2 and piece not in shown]
    leaks = any(piece in message or unquote(piece) in message for piece in pieces)
    return type(error).__name__ if leaks else message


def code_commit() -> str:
    """Return the Git commit of this code, with `-dirty` if files differ from it, or `unknown` outside a checkout."""
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
    # Without this tag the UI opens the experiment as one of language-model traces.
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(name, artifact_location=artifacts, tags=tags))


def create_run(
    client: MlflowClient, config: RunConfig, datasets: Mapping[str, tuple[str, str, str]], tags: Mapping[str, str]
) -> str:
    """Create a run with its configuration, code and data; return its id.

    `datasets` maps a context ("training", "validation") to (name, digest, url).
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
    client.log_inputs(run_id, [_dataset_input(context, *dataset) for context, dataset in datasets.items()])
    return run_id


def origin_tags(command: str) -> dict[str, str]:
    """Return MLflow's tags for the source of a run, which its client does not set: command, user and commit."""
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
    # MLflow allows 36 characters; a tag of the run has the full digest.
    dataset = MetaDataset(source=source, name=name, digest=digest[:36])
    return DatasetInput(dataset=dataset._to_mlflow_entity(), tags=[InputTag("mlflow.data.context", context)])


def read_config(client: MlflowClient, run_id: str) -> bytes:
    """Return the configuration of a run as JSON; raise `TrackingError` if the run has none.

    A run from before the option `evaluate.batching` keeps the padded batches that it was evaluated in.
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
    """Return the newest runs of `detr train`, of one experiment or of all."""
    return list(islice(_runs(client, experiment), limit))


def _runs(client: MlflowClient, experiment: str | None = None, condition: str = "") -> Iterator[Run]:
    """Yield the runs of `detr train` that meet a condition, newest first; the server filters and pages them."""
    ids = [e.experiment_id for e in client.search_experiments() if experiment is None or e.name == experiment]
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
    for condition in conditions:
        found = next(_runs(client, condition=condition), None)
        if found is not None:
            return found
    names = list(dict.fromkeys(str(run.info.run_name) for run in find_runs(client)))
    known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") or "none"
    raise TrackingError(
        f"there is no run {name_or_id!r}; expected a run's id or name (newest: {known}): see `detr runs`"
    )


def set_final_status(client: MlflowClient, run_id: str, phase: str, status: str, warn: Callable[[str], None]) -> None:
    """Set phase and status of a run that has ended; only `warn` on failure, to not hide why the run ended."""
    try:
        client.set_tag(run_id, TAG_PHASE, phase)
        client.set_terminated(run_id, status)
    except unavailable() as error:
        warn(f"warning: could not set the run's status in MLflow to {phase} ({first_line(error)})")
