"""The checkpoints of a run: list them, find the newest and the best, delete those that are not kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from pipeline.checkpoint.location import META, PARTIAL, Location, Url
from pipeline.checkpoint.metadata import deciding_ap, parse_meta, read_meta
from pipeline.errors import CheckpointError
from pipeline.run_folder import CHECKPOINTS, SAVED
from shards.errors import ShardError, one_line
from shards.store import storage

LOG = logging.getLogger(__name__)
_EVALUATION = "evaluation.json"
_DELETED = ".deleted" + PARTIAL


def folder_of(root: Location, step: int) -> Location:
    """Return the location of the checkpoint of `step`."""
    return root / CHECKPOINTS / f"step-{step:08d}"


def list_checkpoints(root: Location) -> list[Location]:
    """Return the complete checkpoints of a run, oldest first."""
    if isinstance(root, Path):
        found = (root / CHECKPOINTS).glob("step-*")
        return [*sorted(path for path in found if not path.name.endswith(PARTIAL) and (path / META).exists())]
    files = [name.split("/") for name in storage.listing(str(root / CHECKPOINTS))]
    steps = sorted(names[0] for names in files if names[0].startswith("step-") and names[1:] == [META])
    return [root / CHECKPOINTS / step for step in steps]


def newest(root: Location) -> Location | None:
    """Return the newest complete checkpoint, or None."""
    return next(reversed(list_checkpoints(root)), None)


def note_saved(folder: Location, step: int) -> None:
    """Record that the checkpoint of `step` is complete, on rank 0; raise `OSError` if that fails."""
    storage.write(str(folder / SAVED), str(step).encode())


def newest_of_run(root: Location, folder: Location) -> Location | None:
    """Return the newest complete checkpoint of the run at `folder`, or None if it has never saved one.

    Raise `CheckpointError` if the run has saved but no checkpoint is found: it must not start again silently.
    """
    found = newest(root)
    if found is None and (step := _saved_step(folder)):
        raise CheckpointError(
            f"{root} holds no checkpoint, but the run has saved step {step} there: is its storage mounted here? Bring it "
            "back, then `detr resume`; `detr train` starts another run"
        )
    return found


def _saved_step(folder: Location) -> str:
    try:
        return storage.read(str(folder / SAVED)).decode()
    except FileNotFoundError:
        return ""


def write_evaluation(path: Location, metrics: Mapping[str, float]) -> None:
    """Write the metrics of a checkpoint beside it."""
    try:
        storage.write(str(path / _EVALUATION), msgspec.json.format(msgspec.json.encode(dict(metrics)), indent=2))
    except OSError as error:
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


def best(root: Location) -> tuple[Location, dict[str, float]] | None:
    """Return the newest checkpoint with the highest AP (of masks, if predicted) and its metrics, or None."""
    evaluated = [(path, read_evaluation(path)) for path in list_checkpoints(root)]
    scored = [(path, metrics) for path, metrics in evaluated if metrics is not None]
    return max(scored, key=lambda pair: (deciding_ap(pair[1]), pair[0].name), default=None)


def pending_evaluation(root: Location) -> list[Location]:
    """Return the complete checkpoints that still have to be evaluated in the background, oldest first."""
    return [path for path in list_checkpoints(root) if read_evaluation(path) is None and _has_flag(path, "evaluate")]


def prune(root: Location, keep: int) -> None:
    """Delete old checkpoints, each atomically.

    The newest `keep`, the best, milestones and those still to be evaluated are kept. A checkpoint that cannot be read
    or deleted stays, with a warning: the next call tries again.
    """
    failures: list[Exception] = []
    with _collecting_failures(failures):
        _remove_leftovers(root)
    with _collecting_failures(failures):
        for path in _deletable(root, keep):
            with _collecting_failures(failures):
                if not _has_flag(path, "milestone"):
                    delete(path)
    if failures:
        message = "deleting old checkpoints in %s failed %d times (%s); tried again at the next checkpoint"
        LOG.warning(message, root, len(failures), one_line(failures[0]))


@contextmanager
def _collecting_failures(failures: list[Exception]) -> Iterator[None]:
    """Append an error of the block to `failures` instead of raising it."""
    try:
        yield
    except (OSError, CheckpointError, ShardError) as error:
        failures.append(error)


def _deletable(root: Location, keep: int) -> list[Location]:
    """Return the checkpoints that may be deleted unless they are milestones."""
    complete = list_checkpoints(root)
    # Listed before looking up the best: a checkpoint evaluated in between must be in one of the two.
    kept = [*pending_evaluation(root), *complete[-keep:]]
    found = best(root)
    if found:
        kept.append(found[0])
    return [path for path in complete if path not in kept]


def _has_flag(path: Location, name: Literal["evaluate", "milestone"]) -> bool:
    """Return a flag of a checkpoint's metadata; False if the file is missing or damaged."""
    try:
        meta = parse_meta(storage.read(str(path / META)))
    except (FileNotFoundError, msgspec.DecodeError):
        return False  # a damaged checkpoint may be deleted; an unreadable one may be a passing error, which is raised
    return bool(getattr(meta, name))


def delete(path: Location) -> None:
    """Delete a checkpoint; from the first moment on it is incomplete."""
    if isinstance(path, Path):
        shutil.rmtree(path.rename(path.with_name(path.name + _DELETED)), ignore_errors=True)
        return
    meta_first = sorted(storage.listing(str(path)), key=lambda name: name != META)
    for name in meta_first:
        storage.remove(str(path / name))


def _remove_leftovers(root: Location) -> None:
    """Delete the remains of killed writes and deletions; nothing may be written meanwhile."""
    if isinstance(root, Path):
        for folder in (root / CHECKPOINTS).glob(f"*{PARTIAL}"):
            shutil.rmtree(folder, ignore_errors=True)
        return
    files = storage.listing(str(root / CHECKPOINTS))
    steps = {name.partition("/")[0] for name in files if name.startswith("step-")}
    for step in steps:
        path = root / CHECKPOINTS / step
        names = [name.partition("/")[2] for name in files if name.startswith(f"{step}/")]
        for name in _leftovers(path, names):
            storage.remove(str(path / name))


def _leftovers(path: Url, names: list[str]) -> list[str]:
    """Return the files of a checkpoint that are not in use: all of them if it is incomplete."""
    if META not in names:
        return names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    used = read_meta(path).state_folder if len(folders) > 1 else ""  # one folder is in use without reading `meta.json`
    return [name for name in names if used and "/" in name and name.partition("/")[0] != used]
