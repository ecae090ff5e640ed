"""What a run has saved, noted in its folder, so that a run whose checkpoints are gone is not taken for one that had none.

Checkpoints may lie elsewhere (`CheckpointConfig.store`), where nothing is found while the storage is not mounted.
"""

from __future__ import annotations

from pathlib import Path

from pipeline import checkpoint
from pipeline.checkpoint_store import Location
from pipeline.errors import CheckpointError
from shards import storage

_NOTE = "saved"


def note_saved(folder: Path, step: int) -> None:
    """Rank 0 says that the checkpoint of `step` is whole. Raises `OSError` where the run's folder cannot be written."""
    storage.write(str(folder / _NOTE), str(step).encode())


def newest_of_run(home: Location, folder: Path) -> Location | None:
    """The newest whole checkpoint of the run of this folder, or None where none was ever saved.

    Raises `CheckpointError` where the run has saved and nothing of it is found: it must not begin anew in silence.
    """
    found = checkpoint.newest(home)
    if found is None and (folder / _NOTE).exists():
        step = (folder / _NOTE).read_text()
        raise CheckpointError(
            f"{home} holds no checkpoint, but the run has saved step {step} there: is its storage mounted here? Bring it "
            "back, then `detr resume`; `detr train` starts another run"
        )
    return found
