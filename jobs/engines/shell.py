"""Pieces of shell that the scripts of several launchers share."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from jobs.clusters.secret import Secret

LINT = "# shellcheck disable=SC1091,SC2016  # files that only the nodes have; values that hold a dollar sign"
"""First line after the header: what shellcheck cannot know about the user's own lines."""


def exports(environment: Mapping[str, str]) -> list[str]:
    """Return a line for each variable that is no secret."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def secret_lines(secrets: Mapping[str, Secret]) -> list[str]:
    """Return lines that read each secret where the script runs, so that the script holds none."""
    lines = []
    for name, secret in secrets.items():
        if secret.kind == "file":
            lines += [f"{name}=$(cat {_path(secret.where)})", f"export {name}"]
        else:
            lines += [f': "${{{secret.where}:?is not set on this node, but secrets.{name} refers to it}}"']
            lines += [f'export {name}="${secret.where}"'] if name != secret.where else []
    return lines


def _path(path: str) -> str:
    return f'"$HOME"/{shlex.quote(path[2:])}' if path.startswith("~/") else shlex.quote(path)


DRIVER = r"""
# A stop reaches the driver, which saves and ends with status 75. A signal interrupts `wait`, so it waits again.
"$@" &
driver=$!
again=1
warned=0
trap 'again=1; warned=1; kill -TERM "$driver" 2>/dev/null || true' TERM INT
status=0
while [ "$again" = 1 ]; do
  again=0
  status=0
  wait "$driver" || status=$?
done
trap - TERM INT
[ "$warned" = 0 ] || echo "the job was asked to stop; its command ended with status $status"
"""
"""Runs the words of the positional parameters as the driver; `status` is how it ended, `warned` 1 if it was asked to."""
