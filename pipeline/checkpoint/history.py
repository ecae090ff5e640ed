"""Evaluations of a run, in one file beside its checkpoints: pruning deletes checkpoints, and with them their metrics."""

from __future__ import annotations

import msgspec

from pipeline.checkpoint.location import Location
from pipeline.run_folder import CHECKPOINTS
from shards.store import storage

_NAME = "evaluations.json"


class Evaluated(msgspec.Struct, frozen=True):
    """Metrics of a step."""

    step: int
    epoch: float
    metrics: dict[str, float]
    loss: float | None = None
    """Mean training loss before the step; None if it was evaluated in the background."""


def read_history(root: Location) -> list[Evaluated]:
    """Return the evaluations of a run by step; none if there is no file, or a damaged one."""
    try:
        return msgspec.json.decode(storage.read(str(root / CHECKPOINTS / _NAME)), type=list[Evaluated])
    except (FileNotFoundError, msgspec.DecodeError):
        return []


def add(root: Location, entry: Evaluated) -> None:
    """Add an evaluation, instead of an earlier one of the same step."""
    entries = {known.step: known for known in read_history(root)} | {entry.step: entry}
    content = msgspec.json.encode([entries[key] for key in sorted(entries)])
    storage.write(str(root / CHECKPOINTS / _NAME), content)
