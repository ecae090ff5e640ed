"""Connection to an MLflow store: its address, and one-line errors without secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pipeline.errors import TrackingAway, TrackingError
from shards.errors import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient


_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
"""MLflow's codes of errors that may pass; its client gives the first to a server that does not answer."""


def tracking_uri() -> str:
    """Return the address of the store; paths are absolute, because workers have other working folders."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


@contextmanager
def translated_errors(remedy: str = "check MLFLOW_TRACKING_URI and the server, then try again") -> Iterator[None]:
    """Raise a one-line `TrackingError` for an MLflow error in the block, `TrackingAway` for one that may pass."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        uri = tracking_uri()
        kind = TrackingAway if error.error_code in _PASSING else TrackingError
        raise kind(f"the MLflow store {without_secret(uri)} failed ({_reason(error, uri)}); {remedy}") from error


def connect(uri: str | None = None) -> MlflowClient:
    """Return a client of the store; raise `TrackingAway` if the store does not answer.

    Retries are short: the spool bridges an outage, not a blocked call.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Creating the SQLite schema prints a hundred lines of migrations at level INFO.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # at each end of a run
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
        raise TrackingAway(
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
    message = one_line(error).replace(uri, shown)
    pieces = [piece for piece in re.split(r"[/:@?&=;#]+", uri) if len(piece) > 2 and piece not in shown]
    leaks = any(piece in message or unquote(piece) in message for piece in pieces)
    return type(error).__name__ if leaks else message
