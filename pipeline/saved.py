"""Record in a run's folder of what it has saved, so that lost checkpoints are not mistaken for a new run.

Checkpoints may be in another storage (`CheckpointConfig.store`), which looks empty while it is not mounted.
"""

from __future__ import annotations

from pathlib import Path

from pipeline import checkpoint
from pipeline.checkpoint_store import Location
from pipeline.errors import CheckpointError
from shards import storage

_NOTE = "saved"


def note_saved(folder: Path, step: int) -> None:
    """Record that the checkpoint of `step` is complete, on rank 0; raise `OSError` if that fails."""
    storage.write(str(folder / _NOTE), str(step).encode())


def newest_of_run(home: Location, folder: Path) -> Location | None:
    """Return the newest complete checkpoint of the run in `folder`, or None if it has never saved one.

    Raise `CheckpointError` if the run has saved but no checkpoint is found: it must not start again silently.
    """
    found = checkpoint.newest(home)
    if found is None and (folder / _NOTE).exists():
        step = (folder / _NOTE).read_text()
        raise CheckpointError(
            f"{home} holds no checkpoint, but the run has saved step {step} there: is its storage mounted here? Bring it "
            "back, then `detr resume`; `detr train` starts another run"
        )
    return found
