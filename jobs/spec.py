"""Clusters that jobs run on: one small typed entry each.

To add a cluster, add a function to `SPECS` that returns its `Spec`.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Spec:
    """A cluster that has this project installed and the storage mounted."""

    name: str
    address: str
    """URL of the cluster's job server, http(s)://HOST:8265."""
    python: str = "python"
    """Python interpreter on the cluster that has this project installed."""
    directory: str = "."
    """Working folder of the command on the cluster; relative paths in the command start here."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the job. No secrets: Ray shows them to everyone who can see the job."""


def _local() -> Spec:
    """Return a cluster whose nodes have the same interpreter and folder as this process, such as this machine."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    return Spec("local", address, python=sys.executable, directory=str(Path.cwd()))


SPECS = {"local": _local}
