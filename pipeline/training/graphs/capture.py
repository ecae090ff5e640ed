"""Recording of a device's work, to be repeated with one launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], list[Tensor]]
Replay = Callable[[], None]


class Capture(Protocol):
    """Recorder of a device's work."""

    def warm(self, work: Callable[[], object]) -> None:
        """Do the work on the stream of captures."""

    def record(self, work: Work) -> tuple[list[Tensor], Replay]:
        """Record the work; return its tensors, which each call of the function with it fills again."""

    def free_bytes(self) -> float:
        """Return the memory that is left."""

    def total_bytes(self) -> float:
        """Return the memory of the device."""


class CudaCapture:
    """Recorder of CUDA graphs that share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def warm(self, work: Callable[[], object]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def record(self, work: Work) -> tuple[list[Tensor], Replay]:
        gc.collect()  # memory that is freed during a capture would be waited for
        graph = torch.cuda.CUDAGraph()
        # Readers, saver and NCCL's watchdog call CUDA meanwhile, which would break a capture of mode "global".
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            tensors = work()
        return tensors, graph.replay

    def free_bytes(self) -> float:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return float(torch.cuda.mem_get_info(self._device)[0])

    def total_bytes(self) -> float:
        return float(torch.cuda.mem_get_info(self._device)[1])
