"""A recorder that repeats the work instead of a graph, and fills the same tensors as a graph would."""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.training.graphs.capture import Replay, Work


class RepeatedWork:
    """Stand-in for `CudaCapture` on a device without graphs; `log` holds what was done, in order."""

    def __init__(
        self, *_: object, shortage_after: int = -1, bytes_each: float = 0.0, free: float = 1e12, total: float = 0.0
    ) -> None:
        self.log: list[str] = []
        self._records, self._shortage_after = 0, shortage_after
        self._bytes_each, self._free, self._total = bytes_each, free, total

    def warm(self, work: Callable[[], object]) -> None:
        self.log.append("warm")
        work()

    def record(self, work: Work) -> tuple[list[Tensor], Replay]:
        number = self._records
        if number == self._shortage_after:
            raise torch.OutOfMemoryError("no memory")
        self._records += 1
        self._free -= self._bytes_each
        self.log.append(f"record {number}")
        tensors = work()

        def replay() -> None:
            self.log.append(f"replay {number}")
            for kept, again in zip(tensors, work(), strict=True):
                kept.copy_(again)

        return tensors, replay

    def free_bytes(self) -> float:
        return self._free

    def total_bytes(self) -> float:
        return self._total
