"""The ranks of a run and their collectives, all but those of gradients and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import USER_ERRORS, CheckpointError, RunConfigError
from shards.errors import ShardError, one_line
from shards.store.retry import StoreError, may_pass

T = TypeVar("T")
_EXPECTED: tuple[type[Exception], ...] = (OSError, *USER_ERRORS)
_BACKENDS = ("gloo", "NCCL")  # in the text of an error of a collective


@dataclass(frozen=True)
class Ranks:
    """Rank, world size and device of this process, and the collectives between the ranks."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: dist.ProcessGroup | None = None
    """Process group of the collectives. None: the default group, which training uses."""
    timeout_s: float = 600.0
    """Timeout in seconds of process groups created here."""
    node: str = ""
    """Name of this process's node, the same for all ranks on it."""

    @property
    def first(self) -> bool:
        """True on rank 0, which writes, logs and decides."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks, in place; return them."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def all_gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order of rank, on every rank. Pickles: only for small values."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; the others' values are ignored. Pickles: only for small values."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def send_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Replace the content of each tensor by rank 0's; their shapes and order must be the same on every rank."""
        if self.world_size == 1:
            return
        with torch.no_grad():
            for tensor in tensors:
                # A backend takes contiguous memory of its device only; a counter of the optimizer may be on the host.
                sent = tensor.detach().to(self.device).contiguous()
                dist.broadcast(sent, src=0, group=self.group)
                if not self.first:
                    tensor.copy_(sent)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def with_new_group(self) -> Ranks:
        """Return the same ranks with a new gloo group, for collectives in another thread; a collective call."""
        if self.world_size == 1:
            return self
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        return replace(self, group=group)


def on_first(ranks: Ranks, act: Callable[[], T]) -> T:
    """Return on every rank the result of `act` on rank 0; a collective call. Pickles: only for small results.

    An error of `act` is raised on every rank, so that none is left waiting: as a `StoreError` if it may pass, as a
    `CheckpointError`, `RunConfigError` or `ShardError` if it is one, and otherwise as an `OSError`.
    """
    outcome: tuple[Any, type[Exception] | None, str] = (None, None, "")
    cause: Exception | None = None
    if ranks.first:
        try:
            outcome = (act(), None, "")
        except _EXPECTED as error:
            cause, kinds = (
                error,
                (kind for kind in (CheckpointError, RunConfigError, ShardError) if isinstance(error, kind)),
            )
            outcome = (None, StoreError if may_pass(error) else next(kinds, OSError), str(error) or one_line(error))
    result, kind, reason = ranks.broadcast(outcome)
    if kind:
        raise kind(reason) from cause
    return cast(T, result)


def is_peer_failure(error: BaseException | str) -> bool:
    """Return True if an error, or its message, is one that a collective raises when another rank has died."""
    return isinstance(error, dist.DistError) or any(backend in str(error) for backend in _BACKENDS)


def default_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
