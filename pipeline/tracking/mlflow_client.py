"""Connection to an MLflow store, and one-line errors without secrets."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import TrackingAway, TrackingError
from pipeline.tracking.server.address import holds_secret, tracking_uri, without_secret
from pipeline.tracking.server.answers import is_away, is_refused_login, reason, refused_login

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["connect", "holds_secret", "tracking_uri", "translated_errors", "unavailable", "without_secret"]


@contextmanager
def translated_errors(remedy: str = "check MLFLOW_TRACKING_URI and the server, then try again") -> Iterator[None]:
    """Raise a one-line `TrackingError` for an MLflow error in the block, `TrackingAway` for one that may pass.

    A login that is refused in the middle of the work may pass too: the password was changed.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        uri = tracking_uri()
        if is_refused_login(error):
            raise TrackingAway(f"{refused_login(uri)}; {remedy}") from error
        if is_away(error):
            raise TrackingAway(
                f"MLflow at {without_secret(uri)} does not answer ({reason(error)}); {remedy}"
            ) from error
        raise TrackingError(f"the MLflow store {without_secret(uri)} failed ({reason(error)}); {remedy}") from error


def connect(uri: str | None = None, *, check: bool = True) -> MlflowClient:
    """Return a client of the store; raise `TrackingAway` if the store does not answer.

    Retries are short: the spool bridges an outage, not a blocked call. Raise `TrackingError` for a refused login.
    Without `check` the store of a server is not asked, so that its client is there during an outage.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Creating the SQLite schema prints a hundred lines of migrations at level INFO.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # At each end of a run MLflow prints links to its pages of language models, with a password in the address.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    import mlflow
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    uri = uri or tracking_uri()
    new = _file_to_be_made(uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(os.environ.get("MLFLOW_REGISTRY_URI") or uri)
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        if check:
            client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, ImportError) as error:  # a database's driver may be missing
        if is_refused_login(error):
            raise TrackingError(refused_login(uri)) from None
        raise TrackingAway(
            f"the MLflow store {without_secret(uri)} does not answer ({reason(error, uri)}); "
            "expected a running server or a database: check MLFLOW_TRACKING_URI"
        ) from None
    if new:
        print(f"new store {new}", file=sys.stderr, flush=True)
    return client


def _file_to_be_made(uri: str) -> str:
    """Return the path of a SQLite store that does not exist yet, relative to the working folder if it lies in it."""
    if not uri.startswith("sqlite:///"):
        return ""
    path = Path(uri.removeprefix("sqlite:///")).absolute()
    if path.exists():
        return ""
    return f"./{path.relative_to(Path.cwd())}" if path.is_relative_to(Path.cwd()) else str(path)


def unavailable() -> tuple[type[Exception], ...]:
    """Return the errors of a store that does not answer; a function, because importing MLflow is slow."""
    from mlflow.exceptions import MlflowException

    return MlflowException, OSError
