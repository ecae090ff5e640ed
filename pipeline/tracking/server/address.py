"""Address of the MLflow store, and the secrets that it may hold."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pipeline.errors import RunConfigError

TRACKING_URI, REGISTRY_URI = "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"
USERNAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"
LOGIN_REMEDY = f"set {USERNAME} and {PASSWORD} (or MLFLOW_TRACKING_TOKEN)"


class _Moved:
    """State of this process: True once a login was taken out of an address."""

    login = False


def tracking_uri() -> str:
    """Return the address of the store; paths are absolute, because workers have other working folders.

    A login in the address of a server moves into the variables that MLflow reads it from, for this process and those
    that it starts. In the address MLflow would print it with its links and errors, and Ray would keep it.
    """
    for name in (TRACKING_URI, REGISTRY_URI):
        _move_login(name)
    return os.environ.get(TRACKING_URI) or f"sqlite:///{Path('mlflow.db').absolute()}"


def secret_in_uri() -> bool:
    """Return whether MLFLOW_TRACKING_URI holds a secret, or has held a login before it was moved."""
    uri = tracking_uri()
    return _Moved.login or holds_secret(uri)


def uri_for_workers() -> str:
    """Return the address of the store to send to workers: empty if they must read it where this process does.

    Ray keeps and shows what workers are sent. Those of this machine inherit the variables of this process.
    """
    uri = tracking_uri()
    return "" if holds_secret(uri) else uri


def refuse_uri_with_secret() -> None:
    """Raise `RunConfigError` if MLFLOW_TRACKING_URI holds a secret, which a cluster's nodes would have to be sent."""
    if secret_in_uri():
        raise RunConfigError(
            f"{TRACKING_URI} holds a user name or password, which Ray would keep and show; expected none: set {USERNAME} "
            f"and {PASSWORD} here and on the cluster's nodes, and put a server before a database with a password"
        )


def _move_login(name: str) -> None:
    uri = os.environ.get(name, "")
    if not uri.startswith(("http://", "https://")):
        return
    try:
        address = urlsplit(uri)
        user, password = address.username, address.password
    except ValueError:
        return
    if not user or not password:
        return  # MLflow sends a login of both only
    login = {USERNAME: unquote(user), PASSWORD: unquote(password)}
    if name == REGISTRY_URI and any(os.environ.get(key, value) != value for key, value in login.items()):
        return  # another login than the store's, for which MLflow has no variables
    os.environ.update(login)
    os.environ[name] = address._replace(netloc=address.netloc.rpartition("@")[2]).geturl()
    _Moved.login |= name == TRACKING_URI


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


def leaks_secret(text: str, uri: str) -> bool:
    """Return whether a text repeats anything of `uri` that `without_secret` masks."""
    shown = without_secret(uri)
    pieces = [piece for piece in re.split(r"[/:@?&=;#]+", uri) if len(piece) > 2 and piece not in shown]
    return any(piece in text or unquote(piece) in text for piece in pieces)


def _has_user(address: str) -> bool:
    """Return whether an address without its scheme has a user; an "@" in the path of a SQLite file is none."""
    return "@" in address and not address.startswith("/")


def _split_query(rest: str) -> tuple[str, str, str]:
    """Return what precedes the query or fragment, the mark `?` or `#`, and what follows it."""
    found = re.search("[?#]", rest)
    return (rest, "", "") if found is None else (rest[: found.start()], found[0], rest[found.end() :])
