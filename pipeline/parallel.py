"""The only home of collectives: who this process is among the workers, and how they speak.

A world of one needs no process group, so the same loop runs in a unit test, on a laptop and on a cluster.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from detr.execution import parts
from detr.model import DETR
from pipeline.errors import USER_ERRORS, first_line

_SAID: tuple[type[Exception], ...] = (OSError, *USER_ERRORS)
Strategy = Literal["single", "ddp", "fsdp"]
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world_size`, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    """Whom the collectives are among; None: all, in the group that training uses."""
    timeout_s: float = 600.0
    """So long a rank waits for the others in a group that is made here."""

    @property
    def first(self) -> bool:
        """True on the one rank that writes, logs and decides."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place and returned."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank. For small or rare things."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; the value that the others pass is not looked at. For small or rare things."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def apart(self) -> Ranks:
        """The same ranks with a group of their own on the host, for another thread; a collective call."""
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        return replace(self, group=group)


def on_first(ranks: Ranks, act: Callable[[], None]) -> None:
    """Let rank 0 act while the others wait; a collective call.

    What goes wrong is raised on every rank, as an OSError: none is left waiting for one that has gone.
    """
    reason = ""
    if ranks.first:
        try:
            act()
        except _SAID as error:
            reason = first_line(error)
    reason = ranks.broadcast(reason)
    if reason:
        raise OSError(reason)


def distribute(model: nn.Module, ranks: Ranks, strategy: Strategy = "ddp") -> nn.Module:
    """Make the model one of several that train together; a collective call.

    ddp: every rank holds all of it, beginning with rank 0's weights. fsdp: parameters, gradients and the optimizer's
    state are divided among the ranks, under the same names; the optimizer is to be built afterwards. A world of one has
    nothing to divide or to average.
    """
    if ranks.world_size == 1:
        return model
    return _shard(model, ranks) if strategy == "fsdp" else _replicate(model, ranks)


def _shard(model: nn.Module, ranks: Ranks) -> nn.Module:
    """FSDP2: a group for each of the model's parts, gathered while it computes, and one for the rest."""
    # What it warns of, changing an output in place, is not done here.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
    for parameter in model.parameters():
        # It divides contiguous memory only; the backbone's activations keep the layout that they come in with.
        parameter.data = parameter.data.contiguous()
    for part in parts(model) if isinstance(model, DETR) else []:
        fully_shard(part, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(model: nn.Module, build: Callable[[], nn.Module], averages: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A model that this rank can run alone: what DDP wraps, or a new one filled with what FSDP has divided; collective.

    Under FSDP every forward pass is a collective, and ranks evaluate different numbers of batches. What is filled is a
    copy of the weights only (166 MB for a ResNet-50). averages: parameters, divided as the model's, that stand where
    those would in a copy.
    """
    bare = unwrap(model)
    if averages is None and not isinstance(bare, FSDPModule):
        return bare
    filled = build()
    weights = get_model_state_dict(bare, options=StateDictOptions(full_state_dict=True))
    for name, value in (averages or {}).items():
        weights[name] = value.full_tensor() if isinstance(value, DTensor) else value
    filled.load_state_dict(weights)
    return filled


@contextmanager
def averaging(model: nn.Module, *, now: bool) -> Iterator[None]:
    """Whether the backward pass inside averages gradients over ranks, or only adds to this rank's own.

    The last of a step's passes averages the sum of all.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    waiting = isinstance(model, DistributedDataParallel) and not now
    with model.no_sync() if waiting else nullcontext():  # type: ignore[operator]
        yield


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float) -> Tensor:
    """Scale the gradients down to a total norm of at most `norm`; return the norm before, over all ranks' parts."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    total = nn.utils.clip_grad_norm_(parameters, norm)
    return total.full_tensor() if isinstance(total, DTensor) else total


def _replicate(model: nn.Module, ranks: Ranks) -> nn.Module:
    """DDP. Buffers are not sent again: those of a frozen batch norm are constants (53,000 floats for a ResNet-50), and a
    trainable one is refused with several workers, since each would normalise by its own images.
    """
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # torch 2.15 renamed the flag; 2.11 knows only the old name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    return DistributedDataParallel(model, device_ids=devices, **options)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrapper, with the original's parameter names."""
    return model.module if isinstance(model, DistributedDataParallel) else model
