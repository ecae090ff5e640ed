"""The checkpoints of a run: list them, find the newest and the best, read and write their metrics."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from pipeline.checkpoint.location import META, PARTIAL, Location
from pipeline.checkpoint.metadata import Meta, deciding_figure, parse_meta, read_meta
from pipeline.errors import CheckpointError
from pipeline.run_folder import CHECKPOINTS, SAVED
from shards.errors import one_line
from shards.store import storage
from shards.store.retry import may_pass

LOG = logging.getLogger(__name__)
STALE_S = 90.0
"""Time for which a file system may show what a folder held before: NFS by default up to 60 s."""
_LOOK_S = 2.0
_EVALUATION = "evaluation.json"


def folder_of(root: Location, step: int) -> Location:
    """Return the location of the checkpoint of `step`."""
    return root / CHECKPOINTS / f"step-{step:08d}"


@dataclass
class Entry:
    """Checkpoint as a listing shows it: its location, and the names in it, with those in folders of states."""

    path: Location
    names: set[str]

    @property
    def complete(self) -> bool:
        """True if the checkpoint can be loaded."""
        return META in self.names

    @property
    def evaluated(self) -> bool:
        """True if there are metrics."""
        return _EVALUATION in self.names


class Shelf:
    """Checkpoints of a run as they were at the last look, oldest first.

    Empty before the first look. A look is one listing. What is read of a checkpoint is kept for later looks: in a store, each file that is read or
    looked for is a request.
    """

    def __init__(self, root: Location) -> None:
        self.root = root
        self.entries: list[Entry] = []
        self._metas: dict[Location, Meta] = {}
        self._metrics: dict[Location, dict[str, float]] = {}

    def look(self) -> Self:
        """List the checkpoints anew; return self."""
        self.entries = sorted(_entries(self.root), key=lambda entry: entry.path.name)
        known = {entry.path for entry in self.entries if entry.complete}
        self._metas = {path: meta for path, meta in self._metas.items() if path in known}
        self._metrics = {path: metrics for path, metrics in self._metrics.items() if path in known}
        return self

    @property
    def complete(self) -> list[Location]:
        """Complete checkpoints, oldest first."""
        return [entry.path for entry in self.entries if entry.complete]

    def add(self, path: Location, meta: Meta) -> None:
        """Take in a checkpoint that this process has just completed, without a look."""
        entry = next((entry for entry in self.entries if entry.path == path), None)
        if entry is None:
            entry = Entry(path, set())
            self.entries = sorted([*self.entries, entry], key=lambda entry: entry.path.name)
        if isinstance(path, Path):
            entry.names.clear()  # the folder was replaced; in a store, metrics stay
        entry.names.add(META)
        self._metas[path] = meta

    def meta(self, path: Location) -> Meta | None:
        """Return the metadata of a complete checkpoint, or None if the file is missing or damaged."""
        if path not in self._metas:
            # A damaged checkpoint may be deleted; an unreadable one may be a passing error, which is raised.
            with suppress(FileNotFoundError, msgspec.DecodeError):
                self._metas[path] = parse_meta(storage.read(str(path / META)))
        return self._metas.get(path)

    def best(self) -> tuple[Location, dict[str, float]] | None:
        """Return the newest checkpoint with the highest PQ or AP (of masks, if predicted) and its metrics, or None."""
        evaluated = [entry.path for entry in self.entries if entry.complete and entry.evaluated]
        scored = [(path, metrics) for path in evaluated if (metrics := self._metrics_of(path)) is not None]
        return max(scored, key=lambda pair: (deciding_figure(pair[1]), pair[0].name), default=None)

    def pending(self) -> list[Location]:
        """Return the complete checkpoints that still have to be evaluated in the background, oldest first."""
        waiting = [entry.path for entry in self.entries if entry.complete and not entry.evaluated]
        return [path for path in waiting if (meta := self.meta(path)) and meta.evaluate]

    def _metrics_of(self, path: Location) -> dict[str, float] | None:
        if path not in self._metrics and (metrics := read_evaluation(path)) is not None:
            self._metrics[path] = metrics
        return self._metrics.get(path)


def _entries(root: Location) -> Iterator[Entry]:
    folder = root / CHECKPOINTS
    if isinstance(folder, Path):
        # Folders are listed, and no file is looked for by name: a network file system may remember for a minute that a
        # file was absent, but lists a folder as it is.
        steps = [name for name in _names(folder) if name.startswith("step-") and not name.endswith(PARTIAL)]
        yield from (Entry(folder / step, set(_names(folder / step))) for step in steps)
        return
    files: dict[str, set[str]] = {}
    for file in storage.listing(str(folder)):
        step, _, name = file.partition("/")
        files.setdefault(step, set()).add(name)
    yield from (Entry(folder / step, names) for step, names in files.items() if step.startswith("step-"))


def _names(folder: Path) -> list[str]:
    """Return the names in a folder; none if it is absent or not a folder."""
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_checkpoints(root: Location) -> list[Location]:
    """Return the complete checkpoints of a run, oldest first."""
    return Shelf(root).look().complete


def newest(root: Location) -> Location | None:
    """Return the newest complete checkpoint, or None."""
    return next(reversed(list_checkpoints(root)), None)


def best(root: Location) -> tuple[Location, dict[str, float]] | None:
    """Return the newest checkpoint with the highest PQ or AP (of masks, if predicted) and its metrics, or None."""
    return Shelf(root).look().best()


def pending_evaluation(root: Location) -> list[Location]:
    """Return the complete checkpoints that still have to be evaluated in the background, oldest first."""
    return Shelf(root).look().pending()


def note_saved(folder: Location, step: int) -> None:
    """Record that the checkpoint of `step` is complete, on rank 0; raise `OSError` if that fails."""
    storage.write(str(folder / SAVED), str(step).encode())


def newest_of_run(root: Location, folder: Location, run_id: str = "") -> Location | None:
    """Return the newest complete checkpoint of the run at `folder`, or None if it has never saved one.

    Raise `CheckpointError` as `newest_with_meta` does.
    """
    found = newest_with_meta(root, folder, run_id=run_id)
    return found and found[0]


def newest_with_meta(
    root: Location, folder: Location, stale_s: float = 0.0, run_id: str = ""
) -> tuple[Location, Meta] | None:
    """Return the newest complete checkpoint of the run at `folder` and its metadata; None if it has never saved one.

    Look again for up to `stale_s` seconds while the checkpoint that the run has saved last is not shown. Then raise
    `CheckpointError` if none is: the run must not start again silently. Raise it also if the checkpoint is not of the
    run `run_id`, since two runs of one name may have been given the same `checkpoint.store`.
    """
    until = time.monotonic() + stale_s
    saved = _saved_step(folder)
    while True:
        found = newest(root)
        if found is None and not saved:
            return None
        meta = _meta_or_none(found) if found else None
        shown = found is not None and found.name >= folder_of(root, saved).name
        if found and meta and shown:
            return found, _of_run(found, meta, run_id)
        if time.monotonic() >= until:
            break
        time.sleep(_LOOK_S)
    if found is None:
        raise CheckpointError(
            f"{root} holds no checkpoint, but the run has saved step {saved} there: is its storage mounted here? Bring it "
            "back, then give the same command again, or `detr resume`"
        )
    if not shown:
        LOG.warning("%s does not hold step %d, which the run has saved; continuing from %s", root, saved, found.name)
    return found, _of_run(found, read_meta(found), run_id)


def _of_run(path: Location, meta: Meta, run_id: str) -> Meta:
    """Return the metadata of a checkpoint; raise `CheckpointError` if it names another run than `run_id`."""
    if run_id and meta.run_id not in ("", run_id):
        raise CheckpointError(
            f"{path} is of run {meta.run_id[:8]}; expected checkpoints of run {run_id[:8]}: another run writes to the same "
            "--checkpoint.store under this name; move its checkpoints away, or start a run with another --run"
        )
    return meta


def _saved_step(folder: Location) -> int:
    try:
        return int(storage.read(str(folder / SAVED)))
    except FileNotFoundError:
        return 0


def _meta_or_none(path: Location) -> Meta | None:
    """Return the metadata of a checkpoint, or None if the file is gone or its view is stale."""
    try:
        return parse_meta(storage.read(str(path / META)))
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        return read_meta(path)  # the same error, in words


def write_evaluation(path: Location, metrics: Mapping[str, float]) -> None:
    """Write the metrics of a checkpoint beside it; raise `CheckpointError`, or an `OSError` that may pass."""
    try:
        storage.write(str(path / _EVALUATION), msgspec.json.format(msgspec.json.encode(dict(metrics)), indent=2))
    except OSError as error:
        if may_pass(error):
            raise
        raise CheckpointError(
            f"{path / _EVALUATION} could not be written ({one_line(error)}); the checkpoint itself is intact, and "
            "`detr resume` evaluates it again: free disk space or restore the access first"
        ) from error


def read_evaluation(path: Location) -> dict[str, float] | None:
    """Return the metrics of a checkpoint, or None if it has not been evaluated."""
    try:
        return msgspec.json.decode(storage.read(str(path / _EVALUATION)), type=dict[str, float])
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{path / _EVALUATION} cannot be read ({error}); expected metrics by name: delete it, and `detr resume` "
            "evaluates the checkpoint again"
        ) from None
