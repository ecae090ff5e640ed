"""The only home of collectives: who this process is among the workers, and how they speak.

A world of one needs no process group, so the same loop runs in a unit test, on a laptop and on a cluster.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process's place: `rank` of `world_size`, and the device it computes on."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """True on the one rank that writes, logs and decides."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place and returned."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank, on every rank. For small or rare things."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()


def distribute(model: nn.Module, ranks: Ranks) -> nn.Module:
    """Wrap the model for data-parallel training. DDP starts by copying rank 0's weights to every rank.

    Buffers are not sent again: those of a frozen batch norm are constants (53,000 floats for a ResNet-50), and a
    trainable one is refused with several workers, since each would normalise by its own images.
    """
    if ranks.world_size == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    # torch 2.15 renamed the flag; 2.11 knows only the old name.
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    return DistributedDataParallel(model, device_ids=devices, **options)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrapper, with the original's parameter names."""
    return model.module if isinstance(model, DistributedDataParallel) else model
