"""The state of a checkpoint: written and loaded by `torch.distributed.checkpoint`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from pipeline.checkpoint import torch_files
from pipeline.checkpoint.catalog import best, folder_of
from pipeline.checkpoint.location import META, PARTIAL, Location, Url
from pipeline.checkpoint.metadata import Best, Meta, deciding_ap, read_meta
from pipeline.checkpoint.safe_reader import RestrictedPlanner, RestrictedReader
from pipeline.distributed.parallel import unwrap
from pipeline.distributed.ranks import Ranks, is_peer_failure, on_first
from pipeline.errors import CheckpointError
from shards.errors import ShardError, one_line
from shards.store import storage
from shards.store.retry import StoreError

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
    completing: Callable[[], None] = lambda: None,
) -> Location:
    """Write a state as the checkpoint of `meta.step` and return its location; a collective call.

    `completing` is called on rank 0 before the checkpoint is complete; if it raises, there is no checkpoint. Raise `CheckpointError` on every rank if it cannot be written.
    """
    target = folder_of(root, meta.step)
    partial = None if isinstance(target, Url) else target.with_name(target.name + PARTIAL)
    try:
        if isinstance(target, Url):
            meta = msgspec.structs.replace(meta, state_folder=torch_files.upload(target, state, ranks))
        elif partial:
            on_first(ranks, lambda: _make_empty(partial))
            writer, single = torch_files.FolderWriter(partial), ranks.world_size == 1
            save_distributed(state, storage_writer=writer, process_group=ranks.group, no_dist=single)
        on_first(ranks, completing)
        on_first(ranks, lambda: _finish(root, target, partial, meta))
    except (OSError, CheckpointException) as error:
        if partial and ranks.first:
            shutil.rmtree(partial, ignore_errors=True)  # its files may be what fills the disk
        remedy = "free disk space there and make it writable" if partial else "restore the store or the access to it"
        raise CheckpointError(
            f"checkpoint {target} could not be written ({_reason(error)}); earlier checkpoints are intact: {remedy}, then "
            "`detr resume`"
        ) from error
    return target


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(root: Location, target: Location, partial: Path | None, meta: Meta) -> None:
    """Write `meta.json` and rename the folder, on rank 0: afterwards the checkpoint is complete."""
    best_so_far = best(root)
    if best_so_far:
        path, metrics = best_so_far
        meta = msgspec.structs.replace(meta, best=Best(read_meta(path).step, deciding_ap(metrics)))
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
    reader = torch_files.reader(path, read_meta(path).state_folder) if isinstance(path, Url) else RestrictedReader(path)
    try:
        load_distributed(state, storage_reader=reader, planner=RestrictedPlanner(), no_dist=single)
    except (OSError, RuntimeError, CheckpointException, ShardError) as error:
        cause = _cause(error)
        if is_peer_failure(cause):
            raise  # Ray restarts the group; nothing is wrong with the checkpoint
        if is_url and isinstance(cause, (StoreError, ShardError)):
            raise CheckpointError(f"checkpoint {path} cannot be read ({_reason(error)})") from error
        raise CheckpointError(f"checkpoint {path} does not fit this model or is damaged ({_reason(error)})") from error


def _cause(error: BaseException) -> BaseException:
    """Return the error of the first rank that failed; torch's own message starts with a list of ranks."""
    failures = getattr(error, "failures", None)
    return _cause(next(iter(failures.values()))[0]) if failures else error


def _reason(error: BaseException) -> str:
    return one_line(_cause(error))
