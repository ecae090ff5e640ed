"""Deletion of old checkpoints, and of what killed writes and deletions left."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.checkpoint.catalog import Entry, Shelf
from pipeline.checkpoint.location import META, PARTIAL, Location
from pipeline.errors import CheckpointError
from pipeline.run_folder import CHECKPOINTS
from shards.errors import ShardError, one_line
from shards.store import storage

LOG = logging.getLogger(__name__)
MOST_WAITING = 50
"""Number of checkpoints that may wait for their evaluation in the background: 24 GB of a ResNet-50."""
_DELETED = ".deleted" + PARTIAL


def prune(shelf: Shelf, keep: int, *, look: bool = False) -> None:
    """Delete old checkpoints, each atomically, and remains of kills; nothing may be written meanwhile.

    The newest `keep`, the best, milestones and those still to be evaluated are kept; of the last at most `MOST_WAITING`.
    A checkpoint that cannot be read or deleted stays, with a warning: the next call tries again. With `look` the shelf
    is listed first.
    """
    failures: list[Exception] = []
    with _collecting_failures(failures):
        if look:
            shelf.look()
        with _collecting_failures(failures):
            _remove_leftovers(shelf)
        for path in _deletable(shelf, keep):
            with _collecting_failures(failures):
                delete(path)
                shelf.entries = [entry for entry in shelf.entries if entry.path != path]
    if failures:
        message = "deleting old checkpoints in %s failed %d times (%s); tried again at the next checkpoint"
        LOG.warning(message, shelf.root, len(failures), one_line(failures[0]))


@contextmanager
def _collecting_failures(failures: list[Exception]) -> Iterator[None]:
    """Append an error of the block to `failures` instead of raising it."""
    try:
        yield
    except (OSError, CheckpointError, ShardError) as error:
        failures.append(error)


def _deletable(shelf: Shelf, keep: int) -> list[Location]:
    complete = shelf.complete
    found = shelf.best()
    kept = {*complete[-keep:], *([found[0]] if found else [])}
    kept |= {path for path in complete if path not in kept and (meta := shelf.meta(path)) and meta.milestone}
    waiting = [path for path in shelf.pending() if path not in kept]
    # The oldest may be under evaluation at this moment.
    given_up = waiting[1 : 1 - MOST_WAITING] if len(waiting) > MOST_WAITING else []
    if given_up:
        LOG.warning(
            "%d checkpoints wait for their evaluation, which is slower than training; deleted without one: %s",
            len(waiting),
            ", ".join(path.name for path in given_up),
        )
    kept |= set(waiting) - set(given_up)
    return [path for path in complete if path not in kept]


def delete(path: Location) -> None:
    """Delete a checkpoint; from the first moment on it is incomplete."""
    if isinstance(path, Path):
        shutil.rmtree(path.rename(path.with_name(path.name + _DELETED)), ignore_errors=True)
        return
    meta_first = sorted(storage.listing(str(path)), key=lambda name: name != META)
    for name in meta_first:
        storage.remove(str(path / name))


def _remove_leftovers(shelf: Shelf) -> None:
    if isinstance(shelf.root, Path):
        for folder in (shelf.root / CHECKPOINTS).glob(f"*{PARTIAL}"):
            shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in shelf.entries:
        for name in _leftovers(shelf, entry):
            storage.remove(str(entry.path / name))
            entry.names.discard(name)


def _leftovers(shelf: Shelf, entry: Entry) -> list[str]:
    """Return the files in a store that are not in use: all of an incomplete checkpoint, and older folders of states."""
    if not entry.complete:
        return sorted(entry.names)
    folders = {name.partition("/")[0] for name in entry.names if "/" in name}
    meta = shelf.meta(entry.path) if len(folders) > 1 else None  # one folder is in use without reading `meta.json`
    used = meta.state_folder if meta else ""
    return [name for name in sorted(entry.names) if used and "/" in name and name.partition("/")[0] != used]
