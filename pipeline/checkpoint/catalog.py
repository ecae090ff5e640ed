"""The checkpoints of a run: list them, find the newest and the best, delete those that are not kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from pipeline.checkpoint import location
from pipeline.checkpoint.location import META, PARTIAL, Location, Url
from pipeline.checkpoint.metadata import deciding_ap, parse_meta, read_meta
from pipeline.errors import CheckpointError
from pipeline.run_folder import CHECKPOINTS, SAVED
from shards.errors import ShardError, one_line
from shards.store import storage

LOG = logging.getLogger(__name__)
_EVALUATION = "evaluation.json"


def folder_of(home: Location, step: int) -> Location:
    """Return the location of the checkpoint of `step`."""
    return home / CHECKPOINTS / f"step-{step:08d}"


def list_checkpoints(home: Location) -> list[Location]:
    """Return the complete checkpoints of a run, oldest first."""
    if isinstance(home, Url):
        return [*location.complete_in_store(home)]
    found = (home / CHECKPOINTS).glob("step-*")
    return [*sorted(path for path in found if not path.name.endswith(PARTIAL) and (path / META).exists())]


def newest(home: Location) -> Location | None:
    """Return the newest complete checkpoint, or None."""
    return next(reversed(list_checkpoints(home)), None)


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


def best(home: Location) -> tuple[Location, dict[str, float]] | None:
    """Return the newest checkpoint with the highest AP (of masks, if predicted) and its metrics, or None."""
    evaluated = [(path, read_evaluation(path)) for path in list_checkpoints(home)]
    scored = [(path, metrics) for path, metrics in evaluated if metrics is not None]
    return max(scored, key=lambda pair: (deciding_ap(pair[1]), pair[0].name), default=None)


def pending_evaluation(home: Location) -> list[Location]:
    """Return the complete checkpoints that still have to be evaluated in the background, oldest first."""
    return [path for path in list_checkpoints(home) if read_evaluation(path) is None and _has_flag(path, "evaluate")]


def prune(home: Location, keep: int) -> None:
    """Delete old checkpoints, each atomically.

    The newest `keep`, the best, milestones and those still to be evaluated are kept. A checkpoint that cannot be read
    or deleted stays, with a warning: the next call tries again.
    """
    failures: list[Exception] = []
    with _collecting_failures(failures):
        remove_leftovers(home, lambda path: read_meta(path).state_folder)
    with _collecting_failures(failures):
        for path in _deletable(home, keep):
            with _collecting_failures(failures):
                if not _has_flag(path, "milestone"):
                    delete(path)
    if failures:
        message = "deleting old checkpoints in %s failed %d times (%s); tried again at the next checkpoint"
        LOG.warning(message, home, len(failures), one_line(failures[0]))


@contextmanager
def _collecting_failures(failures: list[Exception]) -> Iterator[None]:
    """Append an error of the block to `failures` instead of raising it."""
    try:
        yield
    except (OSError, CheckpointError, ShardError) as error:
        failures.append(error)


def _deletable(home: Location, keep: int) -> list[Location]:
    """Return the checkpoints that may be deleted unless they are milestones."""
    complete = list_checkpoints(home)
    # Listed before looking up the best: a checkpoint evaluated in between must be in one of the two.
    kept = [*pending_evaluation(home), *complete[-keep:]]
    found = best(home)
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


def note_saved(folder: Path, step: int) -> None:
    """Record that the checkpoint of `step` is complete, on rank 0; raise `OSError` if that fails."""
    storage.write(str(folder / SAVED), str(step).encode())


def newest_of_run(home: Location, folder: Path) -> Location | None:
    """Return the newest complete checkpoint of the run in `folder`, or None if it has never saved one.

    Raise `CheckpointError` if the run has saved but no checkpoint is found: it must not start again silently.
    """
    found = newest(home)
    if found is None and (folder / SAVED).exists():
        step = (folder / SAVED).read_text()
        raise CheckpointError(
            f"{home} holds no checkpoint, but the run has saved step {step} there: is its storage mounted here? Bring it "
            "back, then `detr resume`; `detr train` starts another run"
        )
    return found


_DELETED = ".deleted" + PARTIAL


def delete(path: Location) -> None:
    """Delete a checkpoint; from the first moment on it is incomplete."""
    if isinstance(path, Path):
        shutil.rmtree(path.rename(path.with_name(path.name + _DELETED)), ignore_errors=True)
        return
    meta_first = sorted(storage.listing(str(path)), key=lambda name: name != META)
    for name in meta_first:
        storage.remove(str(path / name))


def remove_leftovers(home: Location, state_folder_of: Callable[[Url], str]) -> None:
    """Delete the remains of killed writes and deletions; nothing may be written meanwhile.

    `state_folder_of` returns the folder that a complete checkpoint in a store uses.
    """
    if isinstance(home, Path):
        for folder in (home / CHECKPOINTS).glob(f"*{PARTIAL}"):
            shutil.rmtree(folder, ignore_errors=True)
        return
    files = storage.listing(str(home / CHECKPOINTS))
    steps = {name.partition("/")[0] for name in files if name.startswith("step-")}
    for step in steps:
        path = home / CHECKPOINTS / step
        names = [name.partition("/")[2] for name in files if name.startswith(f"{step}/")]
        for name in _leftovers(path, names, state_folder_of):
            storage.remove(str(path / name))


def _leftovers(path: Url, names: list[str], state_folder_of: Callable[[Url], str]) -> list[str]:
    """Return the files of a checkpoint that are not in use: all of them if it is incomplete."""
    if META not in names:
        return names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    used = state_folder_of(path) if len(folders) > 1 else ""  # one folder is in use without reading `meta.json`
    if not used:
        return []
    return [name for name in names if "/" in name and name.partition("/")[0] != used]
