"""Errors of MLflow in a few words: a server that is away, a login that it refuses, a request that it cannot serve."""

from __future__ import annotations

import os
import re
import socket

from pipeline.tracking.server.address import LOGIN_REMEDY, USERNAME, leaks_secret, tracking_uri, without_secret

_PASSING = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")
"""MLflow's codes of errors that may pass; its client gives the first to a server that does not answer."""
_STATUS = re.compile(r"(?:error code|too many) (\d{3})")
_CUT = 200


def reason(error: BaseException, uri: str | None = None) -> str:
    """Return why MLflow or its database failed, in one line without secrets and without MLflow's own sentences.

    `uri` is the address that was used, by default the current one.
    """
    uri = uri or tracking_uri()
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            return "its host is unknown"
        if isinstance(cause, TimeoutError) or type(cause).__name__.endswith("TimeoutError"):
            return "no answer in time"
        if isinstance(cause, OSError) and cause.errno and cause.strerror:
            return cause.strerror.lower()
    for cause in causes:
        if found := _STATUS.search(str(cause)):
            return f"HTTP {found[1]}"
    message = next(iter(str(error).strip().splitlines()), "").replace(uri, without_secret(uri))
    if not message or leaks_secret(message, uri):
        return type(error).__name__
    return message if len(message) <= _CUT else f"{message[:_CUT].rpartition(' ')[0]} ..."


def is_refused_login(error: BaseException) -> bool:
    """Return whether the server wants another login than it got, or any."""
    return getattr(error, "error_code", "") == "UNAUTHENTICATED"


def is_away(error: BaseException) -> bool:
    """Return whether the error may pass: the server or its database does not answer well."""
    if code := getattr(error, "error_code", None):
        return code in _PASSING
    if type(error).__module__.startswith("requests."):
        response = getattr(error, "response", None)
        return response is None or response.status_code >= 500
    return isinstance(error, ConnectionError | TimeoutError)


def refused_login(uri: str) -> str:
    """Return the line about a server that refuses the login."""
    user = os.environ.get(USERNAME)
    got = f"of user {user!r} " if user else ""
    return f"the MLflow server {without_secret(uri)} refused the login {got}(401); expected a user that it knows: {LOGIN_REMEDY}"


def _causes(error: BaseException) -> list[BaseException]:
    """Return the error and what it was raised for; urllib3 keeps that in `reason`, requests among the arguments."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        inside = (getattr(current, "reason", None), *current.args)
        current = (
            current.__cause__
            or current.__context__
            or next((value for value in inside if isinstance(value, BaseException)), None)
        )
    return found
