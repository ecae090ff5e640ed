"""Check that every node sees a folder: its ranks would otherwise write checkpoints that miss their slices."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from pipeline.checkpoint.location import Location
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError


def check_seen(path: Location, ranks: Ranks) -> None:
    """Raise `CheckpointError` if a node does not see the file or folder; a collective call. Every node sees a URL."""
    if ranks.world_size == 1 or not isinstance(path, Path):
        return
    nodes = ranks.all_gather(None if _is_listed(path) else platform.node())
    if missing := sorted({node for node in nodes if node is not None}):
        raise not_seen(path, ", ".join(missing))


def not_seen(path: Location, nodes: str) -> CheckpointError:
    """Return the error for a file of the run that `nodes` do not see."""
    return CheckpointError(
        f"{path} is not there on {nodes}; expected the run's folder as the driver made it: give a --storage that every "
        "node sees: a URL, or a folder mounted at the same path"
    )


def _is_listed(path: Path) -> bool:
    try:
        return path.name in os.listdir(path.parent)  # a file's absence may be remembered by a network file system
    except OSError:
        return False
