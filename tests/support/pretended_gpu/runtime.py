"""Stand-ins for CUDA's runtime, for a stager of checkpoints and for inference mode."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_map

from tests.support.pretended_gpu.record import recorded


class _CudaEvent:
    """Mark in a stream, whose work is done at once."""

    def __init__(self, **_: Any) -> None:
        self._at = 0.0

    def record(self, *_: Any) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Return at once."""

    def elapsed_time(self, end: _CudaEvent) -> float:
        return (end._at - self._at) * 1e3


class _Stream:
    """Stream of the device; all are in order."""

    def __init__(self, *_: Any) -> None:
        recorded().touch("Stream")

    def record_event(self) -> _CudaEvent:
        return _CudaEvent()

    def wait_event(self, event: _CudaEvent) -> None:
        """Return at once."""


class HostStager:
    """Stager of checkpoints that copies each tensor, in place of torch's, which copies memory that is not there."""

    def __init__(self, *_: Any) -> None:
        """Take any options."""

    def stage(self, state: Any) -> Any:
        return tree_map(lambda value: value.cpu().clone() if isinstance(value, torch.Tensor) else value, state)

    def close(self) -> None:
        """Do nothing."""


def set_device(device: Any) -> None:
    recorded().chosen.device = torch.device(device)


def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    recorded().touch("pin_memory")
    return tensor


RUNTIME: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "set_device": set_device,
    "current_stream": lambda *_: _Stream(),
    "stream": lambda *_: nullcontext(),
    "Stream": _Stream,
    "Event": _CudaEvent,
    "max_memory_allocated": lambda *_: 0,
    "get_device_name": lambda *_: "pretended",
}


def enter_no_grad(self: Any) -> None:
    """Record no gradients instead, because tensors of inference mode have no version, which a subclass needs."""
    self.before = torch.is_grad_enabled()
    torch.set_grad_enabled(self.before and not self.mode)


def exit_no_grad(self: Any, *_: object) -> None:
    torch.set_grad_enabled(self.before)
