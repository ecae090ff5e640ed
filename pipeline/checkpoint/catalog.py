"""Checkpoints in the format of torch.distributed.checkpoint, written atomically.

    HOME/checkpoints/step-00001000/      *.distcp, .metadata   model and optimizer, by parameter name
                                         meta.json             metadata, see `Meta`
                                         evaluation.json       metrics, after the evaluation

HOME is a folder, by default the run's own. A checkpoint is written as `step-00001000.partial`, `meta.json` last, and
then renamed, so a name without the suffix is a complete checkpoint. HOME can also be a URL, see `checkpoint_store`. The
state does not depend on the number of workers, has no pickled code and no random state: dropout is seeded by (seed,
step, rank), and the schedule and the order of the data are functions of the step.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from pipeline import checkpoint_store
from pipeline.checkpoint_store import META, PARTIAL, Location, Url
from pipeline.errors import CheckpointError, first_line
from pipeline.meta import Best, Meta, parse_meta
from pipeline.parallel import Ranks, is_peer_failure, on_first, unwrap
from pipeline.restricted import RestrictedPlanner, RestrictedReader
from shards import storage
from shards.errors import ShardError
from shards.retry import StoreError

LOG = logging.getLogger(__name__)
_EMA = "ema"
_EVALUATION = "evaluation.json"
Averages = Mapping[str, Tensor]


def folder_of(home: Location, step: int) -> Location:
    """Return the location of the checkpoint of `step`."""
    return home / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(home: Location) -> list[Location]:
    """Return the complete checkpoints of a run, oldest first."""
    if isinstance(home, Url):
        return [*checkpoint_store.complete_in_store(home)]
    found = (home / "checkpoints").glob("step-*")
    return [*sorted(path for path in found if not path.name.endswith(PARTIAL) and (path / META).exists())]


def newest(home: Location) -> Location | None:
    """Return the newest complete checkpoint, or None."""
    return next(reversed(list_checkpoints(home)), None)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, averages: Averages | None = None) -> dict[str, Any]:
    """Return the state of a checkpoint by parameter name, not copied; a collective call.

    Under FSDP it has this rank's slices. `averages` are those of the weights, if the run makes them.
    """
    fresh = not optimizer.state
    if fresh:
        # The guard has skipped every step so far. torch then creates a state of zeros, but not if there are gradients.
        optimizer.zero_grad(set_to_none=True)
    model_state, optimizer_state = get_state_dict(unwrap(model), optimizer)
    if fresh:
        for moments in optimizer.state.values():
            moments["step"].zero_()  # torch created the state by an empty update, which it counted
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    if averages is not None:
        state[_EMA] = dict(averages)
    return state


def write(home: Location, state: dict[str, Any], meta: Meta, ranks: Ranks) -> Location:
    """Write a state as the checkpoint of `meta.step` and return its location; a collective call.

    Raise `CheckpointError` on every rank if it cannot be written.
    """
    target = folder_of(home, meta.step)
    partial = None if isinstance(target, Url) else target.with_name(target.name + PARTIAL)
    try:
        if isinstance(target, Url):
            meta = msgspec.structs.replace(meta, state_folder=checkpoint_store.upload(target, state, ranks))
        elif partial:
            on_first(ranks, lambda: _make_anew(partial))
            writer, single = checkpoint_store.FolderWriter(partial), ranks.world_size == 1
            save_distributed(state, storage_writer=writer, process_group=ranks.group, no_dist=single)
        on_first(ranks, lambda: _finish(home, target, partial, meta))
    except (OSError, CheckpointException) as error:
        if partial and ranks.first:
            shutil.rmtree(partial, ignore_errors=True)  # its files may be what fills the disk
        remedy = "free disk space there and make it writable" if partial else "restore the store or the access to it"
        raise CheckpointError(
            f"checkpoint {target} could not be written ({_reason(error)}); earlier checkpoints are intact: {remedy}, then "
            "`detr resume`"
        ) from error
    return target


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(home: Location, target: Location, partial: Path | None, meta: Meta) -> None:
    """Write `meta.json` and rename the folder, on rank 0: afterwards the checkpoint is complete."""
    best_so_far = best(home)
    if best_so_far:
        path, metrics = best_so_far
        meta = msgspec.structs.replace(meta, best=Best(read_meta(path).step, _ap(metrics)))
    content = msgspec.json.format(msgspec.json.encode(meta), indent=2)
    storage.write(str((partial or target) / META), content)
    if partial and not isinstance(target, Url):
        storage.sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        storage.sync_folder(target.parent)


def load(
    path: Location,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    averages: Averages | None = None,
) -> None:
    """Load a checkpoint of any number of workers into model, optimizer and averages, in place; a collective call."""
    state = state_of(model, optimizer, averages)
    _read(path, state, single=ranks.world_size == 1)
    set_state_dict(unwrap(model), optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def load_weights(path: Location, model: nn.Module, *, averaged: bool = False) -> None:
    """Load only the model, in place and without collectives; with `averaged`, the averages of its parameters."""
    state: dict[str, Any] = {"model": model.state_dict()}
    if averaged:
        state[_EMA] = {name: torch.empty_like(parameter) for name, parameter in model.named_parameters()}
    _read(path, state, single=True)
    weights: Mapping[str, Tensor] = state["model"] | state.get(_EMA, {})
    model.load_state_dict(weights)


def _read(path: Location, state: dict[str, Any], *, single: bool) -> None:
    """Load a checkpoint into the tensors of `state`; `single`: by this process alone."""
    is_url = isinstance(path, Url)
    if isinstance(path, Url):
        reader = checkpoint_store.reader(path, read_meta(path).state_folder)
    else:
        reader = RestrictedReader(path)
    try:
        load_distributed(state, storage_reader=reader, planner=RestrictedPlanner(), no_dist=single)
    except (OSError, RuntimeError, CheckpointException, ShardError) as error:
        cause = _cause(error)
        if is_peer_failure(cause):
            raise  # Ray restarts the group; nothing is wrong with the checkpoint
        if is_url and isinstance(cause, (StoreError, ShardError)):
            raise CheckpointError(f"checkpoint {path} cannot be read ({_reason(error)})") from error
        raise CheckpointError(f"checkpoint {path} does not fit this model or is damaged ({_reason(error)})") from error


def read_meta(path: Location) -> Meta:
    """Return the metadata of a checkpoint; raise `CheckpointError` if `meta.json` is missing or damaged."""
    try:
        return parse_meta(storage.read(str(path / META)))
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path / META} cannot be read ({error}); expected a complete checkpoint") from None


def write_evaluation(path: Location, metrics: Mapping[str, float]) -> None:
    """Write the metrics of a checkpoint beside it."""
    try:
        storage.write(str(path / _EVALUATION), msgspec.json.format(msgspec.json.encode(dict(metrics)), indent=2))
    except OSError as error:
        raise CheckpointError(
            f"{path / _EVALUATION} could not be written ({first_line(error)}); the checkpoint itself is intact, and "
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
    return max(scored, key=lambda pair: (_ap(pair[1]), pair[0].name), default=None)


def _ap(metrics: Mapping[str, float]) -> float:
    return metrics.get("mask_AP", metrics["AP"])


def waiting(home: Location) -> list[Location]:
    """Return the complete checkpoints that still have to be evaluated in the background, oldest first."""
    return [path for path in list_checkpoints(home) if read_evaluation(path) is None and _says(path, "evaluate")]


def prune(home: Location, keep: int) -> None:
    """Delete old checkpoints, each atomically.

    The newest `keep`, the best, milestones and those still to be evaluated are kept. A checkpoint that cannot be read
    or deleted stays, with a warning: the next call tries again.
    """
    failures: list[Exception] = []
    with _noted(failures):
        checkpoint_store.clear(home, lambda path: read_meta(path).state_folder)
    with _noted(failures):
        for path in _superfluous(home, keep):
            with _noted(failures):
                if not _says(path, "milestone"):
                    checkpoint_store.discard(path)
    if failures:
        message = "deleting old checkpoints in %s failed %d times (%s); tried again at the next checkpoint"
        LOG.warning(message, home, len(failures), first_line(failures[0]))


@contextmanager
def _noted(failures: list[Exception]) -> Iterator[None]:
    """Append an error of the block to `failures` instead of raising it."""
    try:
        yield
    except (OSError, CheckpointError, ShardError) as error:
        failures.append(error)


def _superfluous(home: Location, keep: int) -> list[Location]:
    """Return the checkpoints that may be deleted unless they are milestones."""
    complete = list_checkpoints(home)
    # Listed before looking up the best: a checkpoint evaluated in between must be in one of the two.
    kept = [*waiting(home), *complete[-keep:]]
    found = best(home)
    if found:
        kept.append(found[0])
    return [path for path in complete if path not in kept]


def _says(path: Location, name: Literal["evaluate", "milestone"]) -> bool:
    """Return a flag of a checkpoint's metadata; False if the file is missing or damaged."""
    try:
        meta = parse_meta(storage.read(str(path / META)))
    except (FileNotFoundError, msgspec.DecodeError):
        return False  # a damaged checkpoint may be deleted; an unreadable one may be a passing error, which is raised
    return bool(getattr(meta, name))


def _cause(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed; torch's own message starts with a list of ranks."""
    failures = getattr(error, "failures", None)
    return _cause(next(iter(failures.values()))[0]) if failures else error


def _reason(error: BaseException) -> str:
    return first_line(_cause(error))
