"""Checkpoints: torch.distributed.checkpoint folders that are whole or absent.

    HOME/checkpoints/step-00001000/      *.distcp, .metadata   model and optimizer, by parameter name
                                         meta.json             what this is a checkpoint of (`pipeline/meta.py`)
                                         evaluation.json       its figures, once it has been evaluated

HOME is a folder, the run's own if nothing else is said: there a checkpoint is written as `step-00001000.partial`,
`meta.json` last, and renamed, so a name without the suffix is a whole checkpoint. Or it is a URL; then see
`pipeline/checkpoint_store.py`. The state is independent of the number of workers, holds no pickled code, and no random
state: dropout is seeded by (seed, step, rank) and the schedule and the order of the data are functions of the step.
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
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from pipeline import checkpoint_store
from pipeline.checkpoint_store import META, PARTIAL, Location, Url
from pipeline.errors import CheckpointError, first_line
from pipeline.meta import Best, Meta
from pipeline.parallel import Ranks, on_first, unwrap
from pipeline.restricted import RestrictedPlanner, RestrictedReader
from shards import storage
from shards.errors import ShardError
from shards.retry import StoreError

LOG = logging.getLogger(__name__)
_EMA = "ema"
_EVALUATION = "evaluation.json"
Averages = Mapping[str, Tensor]


def folder_of(home: Location, step: int) -> Location:
    """Where the checkpoint of `step` lies."""
    return home / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(home: Location) -> list[Location]:
    """The whole checkpoints of a run, oldest first. Unfinished ones do not count."""
    if isinstance(home, Url):
        return [*checkpoint_store.complete_in_store(home)]
    found = (home / "checkpoints").glob("step-*")
    return [*sorted(path for path in found if not path.name.endswith(PARTIAL) and (path / META).exists())]


def newest(home: Location) -> Location | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(list_checkpoints(home)), None)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, averages: Averages | None = None) -> dict[str, Any]:
    """What a checkpoint keeps, by parameter name: not copied, and under FSDP this rank's parts; a collective call.

    averages: those of the weights, where the run makes them (`pipeline/ema.py`).
    """
    fresh = not optimizer.state
    if fresh:
        # Every step so far was left out by the guard: torch then takes zeros for the state, but not beside gradients.
        optimizer.zero_grad(set_to_none=True)
    state, optimizer_state = get_state_dict(unwrap(model), optimizer)
    if fresh:
        for moments in optimizer.state.values():
            moments["step"].zero_()  # torch made them with an update of nothing, which is not to count
    return {"model": state, "optimizer": optimizer_state} | ({} if averages is None else {_EMA: dict(averages)})


def save(
    home: Location,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    meta: Meta,
    ranks: Ranks,
    averages: Averages | None = None,
) -> Location:
    """Write the checkpoint of `meta.step` and wait for it; see `write`."""
    return write(home, state_of(model, optimizer, averages), meta, ranks)


def write(home: Location, state: dict[str, Any], meta: Meta, ranks: Ranks) -> Location:
    """Write a state as the checkpoint of `meta.step`; a collective call.

    Raises `CheckpointError` on every rank when it cannot be written.
    """
    target = folder_of(home, meta.step)
    aside = None if isinstance(target, Url) else target.with_name(target.name + PARTIAL)
    try:
        if isinstance(target, Url):
            meta = msgspec.structs.replace(meta, part=checkpoint_store.upload(target, state, ranks))
        elif aside:
            on_first(ranks, lambda: _make_anew(aside))
            writer, alone = checkpoint_store.FolderWriter(aside), ranks.world_size == 1
            save_distributed(state, storage_writer=writer, process_group=ranks.group, no_dist=alone)
        on_first(ranks, lambda: _finish(home, target, aside, meta))
    except (OSError, CheckpointException) as error:
        if aside and ranks.first:
            shutil.rmtree(aside, ignore_errors=True)  # what it holds may be what fills the disk
        remedy = "free disk space there and let it be written to" if aside else "mend the store or the access to it"
        raise CheckpointError(
            f"checkpoint {target} could not be written ({_reason(error)}); earlier checkpoints are intact: {remedy}, then "
            "`detr resume`"
        ) from error
    return target


def _make_anew(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _finish(home: Location, target: Location, aside: Path | None, meta: Meta) -> None:
    """Rank 0's last act: from here on the checkpoint counts."""
    leading = best(home)
    if leading:
        meta = msgspec.structs.replace(meta, best=Best(read_meta(leading[0]).step, _ap(leading[1])))
    content = msgspec.json.format(msgspec.json.encode(meta), indent=2)
    storage.write(str((aside or target) / META), content)
    if aside and not isinstance(target, Url):
        storage.sync_folder(aside)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        storage.sync_folder(target.parent)


def load(
    path: Location,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    averages: Averages | None = None,
) -> None:
    """Fill model, optimizer and averages, in place, from a checkpoint of any number of workers; a collective call."""
    state = state_of(model, optimizer, averages)
    _read(path, state, alone=ranks.world_size == 1)
    set_state_dict(unwrap(model), optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def load_weights(path: Location, model: nn.Module, *, averaged: bool = False) -> None:
    """Fill only the model, in place, in this process alone; `averaged`: with the averages of its parameters."""
    state: dict[str, Any] = {"model": model.state_dict()}
    if averaged:
        state[_EMA] = {name: torch.empty_like(one) for name, one in model.named_parameters()}
    _read(path, state, alone=True)
    weights: Mapping[str, Tensor] = state["model"] | state.get(_EMA, {})
    model.load_state_dict(weights)


def _read(path: Location, state: dict[str, Any], *, alone: bool) -> None:
    stored = isinstance(path, Url)
    reader = checkpoint_store.reader(path, read_meta(path).part) if isinstance(path, Url) else RestrictedReader(path)
    try:
        load_distributed(state, storage_reader=reader, planner=RestrictedPlanner(), no_dist=alone)
    except (OSError, RuntimeError, CheckpointException, ShardError) as error:
        cause = _cause(error)
        if isinstance(cause, dist.DistError) or "gloo" in str(cause):
            raise  # a peer is gone: Ray starts the group again, and nothing is wrong with the checkpoint
        if stored and isinstance(cause, (StoreError, ShardError)):
            raise CheckpointError(f"checkpoint {path} cannot be read ({_reason(error)})") from error
        raise CheckpointError(f"checkpoint {path} does not fit this model or is damaged ({_reason(error)})") from error


def read_meta(path: Location) -> Meta:
    """The `meta.json` of a checkpoint, read strictly."""
    try:
        return msgspec.json.decode(storage.read(str(path / META)), type=Meta)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path / META} cannot be read ({error}); expected a whole checkpoint") from None


def write_evaluation(path: Location, metrics: Mapping[str, float]) -> None:
    """Note a checkpoint's figures beside it."""
    try:
        storage.write(str(path / _EVALUATION), msgspec.json.format(msgspec.json.encode(dict(metrics)), indent=2))
    except OSError as error:
        raise CheckpointError(
            f"{path / _EVALUATION} could not be written ({first_line(error)}); the checkpoint itself is intact, and "
            "`detr resume` evaluates it again: free disk space, or mend the access, before"
        ) from error


def read_evaluation(path: Location) -> dict[str, float] | None:
    """A checkpoint's figures, or None while it has not been evaluated."""
    try:
        return msgspec.json.decode(storage.read(str(path / _EVALUATION)), type=dict[str, float])
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise CheckpointError(
            f"{path / _EVALUATION} cannot be read ({error}); expected figures by name: delete it, and `detr resume` "
            "evaluates the checkpoint again"
        ) from None


def best(home: Location) -> tuple[Location, dict[str, float]] | None:
    """The evaluated checkpoint of highest AP (of masks where the run predicts them), the newest of equals, and its figures."""
    evaluated = [(path, read_evaluation(path)) for path in list_checkpoints(home)]
    scored = [(path, metrics) for path, metrics in evaluated if metrics is not None]
    return max(scored, key=lambda pair: (_ap(pair[1]), pair[0].name), default=None)


def _ap(metrics: Mapping[str, float]) -> float:
    return metrics.get("mask_AP", metrics["AP"])


def waiting(home: Location) -> list[Location]:
    """The whole checkpoints that are to be evaluated beside the training and have no figures yet, oldest first."""
    return [path for path in list_checkpoints(home) if read_evaluation(path) is None and _says(path, "evaluate")]


def prune(home: Location, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, the best, milestones, and what waits. Each vanishes at once.

    What cannot be read or deleted stays, with a warning: the next call tries again.
    """
    failures: list[Exception] = []
    with _noted(failures):
        checkpoint_store.clear(home, lambda path: read_meta(path).part)
    with _noted(failures):
        for path in _superfluous(home, keep):
            with _noted(failures):
                if not _says(path, "milestone"):
                    checkpoint_store.discard(path)
    if failures:
        said = "of what is old in %s, %d could not be deleted (%s); tried again at the next checkpoint"
        LOG.warning(said, home, len(failures), first_line(failures[0]))


@contextmanager
def _noted(failures: list[Exception]) -> Iterator[None]:
    try:
        yield
    except (OSError, CheckpointError, ShardError) as error:
        failures.append(error)


def _superfluous(home: Location, keep: int) -> list[Location]:
    """What may go, unless it is a milestone."""
    whole = list_checkpoints(home)
    # Before the best is looked up: one that gets its figures meanwhile is there or here.
    kept = [*waiting(home), *whole[-keep:]]
    leading = best(home)
    return [path for path in whole if path not in kept and (leading is None or path != leading[0])]


def _says(path: Location, name: Literal["evaluate", "milestone"]) -> bool:
    try:
        meta = msgspec.json.decode(storage.read(str(path / META)), type=Meta)
    except (FileNotFoundError, msgspec.DecodeError):
        return False  # damaged, so of no use; what cannot be read for the time being may well be of use
    return bool(getattr(meta, name))


def _cause(error: BaseException) -> BaseException:
    """What happened on the first rank where something did; torch's own account begins with the ranks."""
    failures = getattr(error, "failures", None)
    return _cause(next(iter(failures.values()))[0]) if failures else error


def _reason(error: BaseException) -> str:
    return first_line(_cause(error))
