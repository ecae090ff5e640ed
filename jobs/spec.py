"""Where and with what a job runs: one small typed entry per cluster.

To add a cluster, add an entry to `SPECS`. The command that runs there is the same `detr ...` as anywhere.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Spec:
    """A place to run. The code is installed and the storage mounted there already."""

    name: str
    address: str
    """The cluster's job server, http(s)://HOST:8265."""
    python: str = "python"
    """The interpreter on the cluster that has this project installed."""
    directory: str = "."
    """Folder on the cluster in which the command runs; relative paths in it are meant from here."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for the job. No secrets: Ray shows a job's environment to whoever may see the job."""


def _local() -> Spec:
    """The cluster at the given address on this machine: same interpreter, same folder."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    return Spec("local", address, python=sys.executable, directory=str(Path.cwd()))


SPECS = {"local": _local}
