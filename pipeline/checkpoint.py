"""Checkpoints: torch.distributed.checkpoint folders that are whole or absent.

    <run folder>/checkpoints/step-00001000/      *.distcp, .metadata   model and optimizer, by parameter name
                                                 meta.json             what this is a checkpoint of
                                                 evaluation.json       its figures, once it has been evaluated

A folder is written as `step-00001000.partial`, `meta.json` last, and renamed: a name without the suffix is a whole
checkpoint. The state is independent of the number of workers, holds no pickled code, and no random state: dropout is
seeded by (seed, step, rank) and the schedule and the order of the data are functions of the step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from pipeline.errors import CheckpointError, first_line
from pipeline.parallel import Ranks, unwrap
from pipeline.restricted import RestrictedPlanner, RestrictedReader

FORMAT = 1
_META = "meta.json"
_EVALUATION = "evaluation.json"
_PARTIAL = ".partial"
_DELETED = ".deleted" + _PARTIAL


class Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a checkpoint is of: enough to refuse the wrong data and to say where it came from."""

    step: int
    epoch: float
    samples: int
    run_id: str
    seed: int
    batch_size: int
    train_digest: str
    num_classes: int
    code_commit: str
    world_size: int
    versions: dict[str, str]
    format: int = FORMAT
    # Options of the plan, and where its cut into steps begins: absent, and as here, before there were any.
    sort_window: int = 1
    shuffle_shards: int = 0
    epoch_tail: str = "straddle"
    origin_step: int = 0
    origin_samples: int = 0
    plan_version: int = 1


def folder_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def complete(run_folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first. Unfinished ones do not count."""
    found = (run_folder / "checkpoints").glob("step-*")
    return sorted(path for path in found if not path.name.endswith(_PARTIAL) and (path / _META).exists())


def newest(run_folder: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    return next(reversed(complete(run_folder)), None)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a checkpoint keeps, by parameter name: not copied, and under FSDP this rank's parts; a collective call."""
    state, optimizer_state = get_state_dict(unwrap(model), optimizer)
    return {"model": state, "optimizer": optimizer_state}


def save(run_folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Meta, ranks: Ranks) -> Path:
    """Write the checkpoint of `meta.step` and wait for it; see `write`."""
    return write(run_folder, state_of(model, optimizer), meta, ranks)


def write(run_folder: Path, state: dict[str, Any], meta: Meta, ranks: Ranks) -> Path:
    """Write a state as the checkpoint of `meta.step`; a collective call.

    Raises `CheckpointError` when it cannot be written.
    """
    target = folder_of(run_folder, meta.step)
    aside = target.with_name(target.name + _PARTIAL)
    try:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.barrier()
        alone = ranks.world_size == 1
        save_distributed(state, checkpoint_id=str(aside), process_group=ranks.group, no_dist=alone)
        if ranks.first:
            _write_synced(aside / _META, msgspec.json.format(msgspec.json.encode(meta), indent=2))
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    except (OSError, CheckpointException) as error:
        raise CheckpointError(
            f"checkpoint {target} could not be written ({_reason(error)}); earlier checkpoints are intact: "
            "free disk space or choose another --storage, then `detr resume`"
        ) from error
    ranks.barrier()
    return target


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Fill model and optimizer, in place, from a checkpoint of any number of workers; a collective call."""
    state = state_of(model, optimizer)
    _read(path, state, alone=ranks.world_size == 1)
    set_state_dict(unwrap(model), optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill only the model, in place, in this process alone."""
    state: dict[str, Any] = {"model": model.state_dict()}
    _read(path, state, alone=True)
    weights: Mapping[str, Tensor] = state["model"]
    model.load_state_dict(weights)


def _read(path: Path, state: dict[str, Any], *, alone: bool) -> None:
    try:
        load_distributed(state, storage_reader=RestrictedReader(path), planner=RestrictedPlanner(), no_dist=alone)
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise  # a peer is gone: Ray starts the group again, and nothing is wrong with the checkpoint
        raise CheckpointError(f"checkpoint {path} does not fit this model or is damaged ({_reason(error)})") from error


def read_meta(path: Path) -> Meta:
    """The `meta.json` of a checkpoint, read strictly."""
    try:
        return msgspec.json.decode((path / _META).read_bytes(), type=Meta)
    except (OSError, msgspec.DecodeError) as error:
        raise CheckpointError(f"{path / _META} cannot be read ({error}); expected a whole checkpoint") from None


def write_evaluation(path: Path, metrics: Mapping[str, float]) -> None:
    """Note a checkpoint's figures beside it."""
    aside = path / (_EVALUATION + _PARTIAL)
    _write_synced(aside, msgspec.json.format(msgspec.json.encode(dict(metrics)), indent=2))
    aside.rename(path / _EVALUATION)


def read_evaluation(path: Path) -> dict[str, float] | None:
    """A checkpoint's figures, or None while it has not been evaluated."""
    try:
        return msgspec.json.decode((path / _EVALUATION).read_bytes(), type=dict[str, float])
    except FileNotFoundError:
        return None


def best(run_folder: Path) -> tuple[Path, dict[str, float]] | None:
    """The evaluated checkpoint of highest AP (of masks where the run predicts them), the newest of equals, and its figures."""
    evaluated = [(path, read_evaluation(path)) for path in complete(run_folder)]
    scored = [(path, metrics) for path, metrics in evaluated if metrics is not None]
    return max(scored, key=lambda pair: (pair[1].get("mask_AP", pair[1]["AP"]), pair[0].name), default=None)


def prune(run_folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best. The rename makes each vanish at once."""
    for left in (run_folder / "checkpoints").glob(f"*{_DELETED}"):  # by a kill in the middle of this function
        shutil.rmtree(left, ignore_errors=True)
    leading = best(run_folder)
    kept = {path for path in complete(run_folder)[-keep:]} | ({leading[0]} if leading else set())
    for path in complete(run_folder):
        if path not in kept:
            doomed = path.rename(path.with_name(path.name + _DELETED))
            shutil.rmtree(doomed, ignore_errors=True)


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        # Its own text begins with the ranks; what happened to the first of them says more.
        error = next(iter(error.failures.values()))[0]
    return first_line(error)
