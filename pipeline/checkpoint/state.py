"""The state of a checkpoint: written and loaded by `torch.distributed.checkpoint`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.tensor import DTensor

from pipeline.checkpoint import torch_files
from pipeline.checkpoint.catalog import Shelf, folder_of
from pipeline.checkpoint.location import META, PARTIAL, Location, Url
from pipeline.checkpoint.metadata import Best, Meta, deciding_figure, read_meta
from pipeline.checkpoint.plans import Plans
from pipeline.checkpoint.safe_reader import RestrictedPlanner, RestrictedReader
from pipeline.distributed.parallel import unwrap
from pipeline.distributed.ranks import Ranks, is_peer_failure, on_first
from pipeline.errors import CheckpointError
from shards.errors import ShardError, one_line
from shards.store import storage
from shards.store.retry import StoreError, may_pass

_EMA = "ema"
Averages = Mapping[str, Tensor]


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


def write(
    root: Location,
    state: dict[str, Any],
    meta: Meta,
    ranks: Ranks,
    shelf: Shelf | None = None,
    plans: Plans | None = None,
    completing: Callable[[], None] = lambda: None,
) -> Location:
    """Write a state as the checkpoint of `meta.step` and return its location; a collective call.

    A caller that saves again and again passes `plans`, and on rank 0 its `shelf`. `completing` is called there before the
    checkpoint is complete. Raise on every rank `StoreError` if a later attempt may succeed, else `CheckpointError`.
    """
    target = folder_of(root, meta.step)
    plans = plans or Plans()
    partial = None if isinstance(target, Url) else target.with_name(target.name + PARTIAL)
    try:
        if isinstance(target, Url):
            meta = msgspec.structs.replace(meta, state_folder=torch_files.upload(target, state, plans.planner(), ranks))
        elif partial:
            on_first(ranks, lambda: _make_empty(partial))
            torch_files.save(state, torch_files.FolderWriter(partial), plans.planner(), ranks)
        on_first(ranks, completing)
        on_first(ranks, lambda: _finish(shelf or Shelf(root), target, partial, meta))
    except (OSError, ShardError, CheckpointException) as error:
        plans.forget()
        if partial and ranks.first:
            shutil.rmtree(partial, ignore_errors=True)  # its files may be what fills the disk
        if _may_pass(error):
            raise StoreError(f"checkpoint {target} is not saved ({_reason(error)})") from error
        remedy = "free disk space there and make it writable" if partial else "restore the store or the access to it"
        raise CheckpointError(
            f"checkpoint {target} could not be written ({_reason(error)}); earlier checkpoints are intact: {remedy}, then "
            "`detr resume`"
        ) from error
    return target


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(shelf: Shelf, target: Location, partial: Path | None, meta: Meta) -> None:
    """Write `meta.json` and rename the folder, on rank 0: afterwards the checkpoint is complete."""
    shelf.look()
    best_so_far = shelf.best()
    if best_so_far and (best_meta := shelf.meta(best_so_far[0])):
        meta = msgspec.structs.replace(meta, best=Best(best_meta.step, deciding_figure(best_so_far[1])))
    content = msgspec.json.format(msgspec.json.encode(meta), indent=2)
    storage.write(str((partial or target) / META), content)
    if partial and not isinstance(target, Url):
        storage.sync_folder(partial)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        storage.sync_folder(target.parent)
    shelf.add(target, meta)


def load(
    path: Location,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    averages: Averages | None = None,
) -> None:
    """Load a checkpoint of any number of workers into model, optimizer and averages, in place; a collective call.

    Ranks that hold the whole state get it from rank 0; those that hold slices of it read these.
    """
    state = state_of(model, optimizer, averages)
    if ranks.world_size > 1 and not any(isinstance(value, DTensor) for _, _, value in _leaves(state)):
        on_first(ranks, lambda: _read(path, state, Ranks()))
        _send(state, ranks)
    else:
        _read(path, state, ranks)
    set_state_dict(unwrap(model), optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def _leaves(state: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Yield each value of nested dictionaries and lists, after the container and the key that hold it."""
    for key, value in list(state.items() if isinstance(state, dict) else enumerate(state)):
        if isinstance(value, dict | list):
            yield from _leaves(value)
        else:
            yield state, key, value


def _send(state: dict[str, Any], ranks: Ranks) -> None:
    """Replace the tensors and other values of the state by those of rank 0."""
    leaves = list(_leaves(state))
    ranks.send_tensors(value for _, _, value in leaves if isinstance(value, Tensor))
    others = [(container, key, value) for container, key, value in leaves if not isinstance(value, Tensor)]
    received = ranks.broadcast([value for _, _, value in others])
    for (container, key, _), value in zip(others, received, strict=True):
        container[key] = value


def load_weights(path: Location, model: nn.Module, *, averaged: bool = False) -> None:
    """Load only the model, in place and without collectives; with `averaged`, the averages of its parameters."""
    state: dict[str, Any] = {"model": model.state_dict()}
    if averaged:
        state[_EMA] = {name: torch.empty_like(parameter) for name, parameter in model.named_parameters()}
    _read(path, state, Ranks())
    weights: Mapping[str, Tensor] = state["model"] | state.get(_EMA, {})
    model.load_state_dict(weights)


def _read(path: Location, state: dict[str, Any], ranks: Ranks) -> None:
    """Load a checkpoint into the tensors of `state`; a collective call.

    Raise on every rank `StoreError` if a later attempt may succeed, else `CheckpointError`.
    """
    reader = _reader(path, ranks)
    try:
        load_distributed(state, storage_reader=reader, planner=RestrictedPlanner(), no_dist=ranks.world_size == 1)
    except (OSError, RuntimeError, CheckpointException, ShardError) as error:
        cause = _cause(error)
        if is_peer_failure(cause):
            raise  # Ray restarts the group; nothing is wrong with the checkpoint
        away = reader.failure is not None and may_pass(reader.failure)
        # torch raises its error on every rank. Any other is of this rank alone, which must not wait for the others.
        outages = ranks.all_gather(away) if isinstance(error, CheckpointException) else [away]
        if _may_pass(error, outages):
            reason = one_line(reader.failure) if reader.failure else _reason(error)
            raise StoreError(f"checkpoint {path} cannot be read now ({reason})") from error
        if isinstance(cause, ShardError):
            raise CheckpointError(f"checkpoint {path} cannot be read ({_reason(error)})") from error
        raise CheckpointError(f"checkpoint {path} does not fit this model or is damaged ({_reason(error)})") from error


def _reader(path: Location, ranks: Ranks) -> RestrictedReader:
    """Return the reader of a checkpoint; rank 0 looks where its state is, as the others could see another attempt."""
    if not isinstance(path, Url):
        return RestrictedReader(path)
    return torch_files.reader(path, on_first(ranks, lambda: read_meta(path).state_folder))


def _may_pass(error: BaseException, outages: Sequence[bool] = ()) -> bool:
    """Return True if a later attempt may succeed: every rank that failed did so because the store did not answer.

    `outages` tells of each rank if that is known besides from its error.
    """
    failures = getattr(error, "failures", None)
    if not failures:
        return may_pass(error)
    away = {rank for rank, outage in enumerate(outages) if outage}
    return all(rank in away or may_pass(failure[0]) for rank, failure in failures.items())


def _cause(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed; torch's own message starts with a list of ranks."""
    failures = getattr(error, "failures", None)
    return _cause(next(iter(failures.values()))[0]) if failures else error


def _reason(error: BaseException) -> str:
    return one_line(_cause(error))
