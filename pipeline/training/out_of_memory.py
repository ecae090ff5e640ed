"""Explanation of running out of memory: the step, its size, the largest users of memory, and the settings to lower."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from detr.batch import Batch
from pipeline.config import RunConfig
from pipeline.distributed.parallel import local_tensor
from pipeline.distributed.ranks import Ranks
from pipeline.errors import TrainingError
from shards.store.sizes import size_text

# "Tried to allocate 2.50 GiB" (CUDA), "you tried to allocate 4294967296 bytes" (CPU).
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?([KMG]i?B|bytes)")
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class MemoryShortage(TrainingError):
    """Raised when a worker has not enough memory for a step; a restart would end in the same way."""


def is_shortage(error: BaseException) -> bool:
    """Return True if an error means that the device's or this process's memory is exhausted."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _NO_MEMORY)


@contextmanager
def explaining(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    config: RunConfig,
    ranks: Ranks,
    step: int,
) -> Iterator[None]:
    """Turn an out-of-memory error of the block, which runs step `step` on `batches`, into a `MemoryShortage`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        raise MemoryShortage(_message(error, _table(model, optimizer), batches, config, ranks, step)) from error


def _message(
    error: BaseException, table: dict[str, int], batches: Sequence[Batch], config: RunConfig, ranks: Ranks, step: int
) -> str:
    largest = max(batches, key=lambda batch: batch.images.numel())
    count, _, height, width = largest.images.shape
    kind, peak = _peak(ranks.device)
    wanted = _WANTED.search(str(error))
    sizes = [f"{name} {size_text(size)}" for name, size in table.items()]
    sizes.append(peak)
    if wanted:
        more = size_text(int(wanted[1])) if wanted[2] == "bytes" else f"{wanted[1]} {wanted[2]}"
        sizes.append(f"{more} more were wanted")
    canvas = f"{count} {'image' if count == 1 else 'images'} of {height}x{width}"
    return (
        f"step {step}: worker {ranks.rank} ran out of {kind} memory in a pass of {canvas} ({', '.join(sizes)}); "
        f"expected a step that fits: {' or '.join(_remedies(config, ranks, count))}"
    )


def _remedies(config: RunConfig, ranks: Ranks, images: int) -> list[str]:
    """Return the flags that save memory, the cheapest first; none changes the result by more than rounding."""
    compute = config.compute
    flags = []
    if compute.graphs:
        flags.append("--compute.no-graphs")
    if images > 1:
        flags.append(f"--compute.max-microbatch {images // 2}")
    if compute.recompute != "both" and config.model.norm != "batch" and not compute.graphs:
        flags.append("--compute.recompute both")
    if compute.precision == "fp32":
        flags.append("--compute.precision bf16")
    if ranks.world_size > 1 and config.cluster.strategy != "fsdp" and not compute.graphs:
        flags.append("--cluster.strategy fsdp")
    return flags or ["smaller images (--transform.max-size)"]


def _table(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state on this worker."""
    parameters = list(model.parameters())
    moments = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return {
        "weights": _bytes(parameters),
        "gradients": _bytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        "optimizer": _bytes(moments),
    }


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = (local_tensor(tensor) for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def _peak(device: torch.device) -> tuple[str, str]:
    """Return the kind of memory ("GPU" or "host") and its peak use as text."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return "GPU", f"peak {size_text(torch.cuda.max_memory_allocated(device))} of {size_text(total)}"
    return "host", f"peak {size_text(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}"
