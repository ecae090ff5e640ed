"""The file of clusters: `detr.toml` in the working folder, and `~/.config/detr/clusters.toml`.

[clusters.lab]
launcher = "ray"
address = "http://head:8265"
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import urlsplit

import msgspec

from jobs.clusters.entries import ENTRIES, Cluster, Head, Nodes, Ray, fields_of
from jobs.errors import ClusterFileError, JobError
from jobs.nearest import nearest

NAME = "detr.toml"
LOCAL = "local"
_NESTED: dict[str, type[msgspec.Struct]] = {"nodes": Nodes, "head": Head}


def files() -> list[Path]:
    """Return the files that may describe clusters, the first of which wins."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return [Path(NAME).absolute(), (Path(home) if home else Path.home() / ".config") / "detr" / "clusters.toml"]


def local() -> Ray:
    """Return the Ray cluster of this machine: the same interpreter and folder as this process."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    return Ray(name=LOCAL, address=address, code="installed", python=sys.executable, directory=str(Path.cwd()))


def is_loopback(address: str) -> bool:
    """Return True if a URL names this machine's loopback interface."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_clusters() -> dict[str, Cluster]:
    """Return all entries by name, `local` among them; raise `ClusterFileError` for a mistake in a file."""
    found: dict[str, Cluster] = {LOCAL: local()}
    for path in reversed(files()):
        if path.is_file():
            found |= read_file(path)
    return found


def find_cluster(name: str) -> Cluster:
    """Return the entry of this name; raise `JobError` for an unknown one."""
    known = read_clusters()
    if name in known:
        return known[name]
    where = " or ".join(str(path) for path in files())
    raise JobError(
        f"there is no cluster {name!r}; did you mean {nearest(name, known)}? Expected one of: {', '.join(sorted(known))}, "
        f"or an entry [clusters.{name}] in {where}"
    )


def read_file(path: Path) -> dict[str, Cluster]:
    """Return the entries of a file by name."""
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ClusterFileError(f"{path}: is not TOML ({error}); expected [clusters.NAME] and its keys") from None
    unknown = [key for key in content if key != "clusters"]
    if unknown:
        raise ClusterFileError(f"{path}: has {unknown[0]!r} at the top; expected only [clusters.NAME]")
    tables = content.get("clusters", {})
    if not isinstance(tables, dict):
        raise ClusterFileError(f"{path}: clusters is no table; expected [clusters.NAME]")
    return {name: _entry(table, name, f"{path}: clusters.{name}") for name, table in tables.items()}


def _entry(table: Any, name: str, where: str) -> Cluster:
    if not isinstance(table, dict):
        raise ClusterFileError(f"{where} is no table; expected [clusters.{name}]")
    if not re.fullmatch(r"[a-z0-9]([-_a-z0-9]*[a-z0-9])?", name) or len(name) > 40:
        raise ClusterFileError(f"{where}: is no name of a cluster; expected at most 40 of a-z, 0-9, - and _")
    if name == LOCAL:  # this machine's token goes to it
        raise ClusterFileError(f"{where}: is always this machine's own Ray cluster; expected another name")
    launcher = table.get("launcher")
    if launcher not in ENTRIES:
        meant = f": did you mean {nearest(launcher, ENTRIES)}?" if isinstance(launcher, str) else ""
        got = f"launcher is {launcher!r}" if launcher is not None else "has no launcher"
        raise ClusterFileError(f"{where}: {got}; expected one of {', '.join(ENTRIES)}{meant}")
    kind = ENTRIES[launcher]
    _check_keys(table, kind, where)
    try:
        entry = msgspec.convert(table, kind)
        return msgspec.structs.replace(entry, name=name)
    except msgspec.ValidationError as error:
        raise ClusterFileError(f"{where}: {_plain(str(error), kind)}") from None
    except ClusterFileError as error:
        raise ClusterFileError(f"{where}: {error}") from None


def _check_keys(table: dict[str, Any], kind: type[msgspec.Struct], where: str, prefix: str = "") -> None:
    """Raise for the first key that the table cannot have, with the nearest that it can."""
    known = [*fields_of(kind), *(["launcher"] if not prefix else [])]
    for key, value in table.items():
        if key not in known:
            others = ", ".join(sorted(known))
            raise ClusterFileError(
                f"{where}: there is no key {prefix}{key}; did you mean {prefix}{nearest(key, known)}? Expected {others}"
            )
        if key in _NESTED and isinstance(value, dict):
            _check_keys(value, _NESTED[key], where, f"{key}.")


def _plain(message: str, kind: type[msgspec.Struct]) -> str:
    """Return msgspec's message with the key in front: "nodes.gpus: expected `int`, got `str`"."""
    text, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    text = text.replace("Object missing required field", "has no key")
    if text.startswith("Invalid enum value"):
        text = f"{text}; expected {' or '.join(map(str, get_args(get_type_hints(kind).get(path))))}"
    if text.startswith(("Expected", "Invalid")):
        text = text[0].lower() + text[1:]
    return f"{path}: {text}" if path else text
