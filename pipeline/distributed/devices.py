"""Devices of workers: made current in each thread, and named, because times of runs are compared by it.

CUDA's current device belongs to a thread and is GPU 0 in a new one, and Ray shows a worker all GPUs of its node. A thread that
touches CUDA before it has chosen the worker's device makes a context on GPU 0, of about 500 MiB for each worker. Ray sets the
device in the training thread alone. Of the others these touch CUDA, and call `use_device` first:

- readers, of training and evaluation: page-locked memory asks for events of earlier blocks (`pipeline.data.loader`).
- saver: it copies the state in a stream of its own, and leaving a stream sets the device that was current before
  (`pipeline.checkpoint.saver`). torch's writer of files gets copies on the host, and is told to start no stream for them
  (`pipeline.checkpoint.torch_files`), since it would also where a worker without a GPU sees those of its node.
- load: the memory of the GPU (`pipeline.cluster.load.machine`).

Planning, reports, MLflow, notes and the watch for hangs touch none. Streams and events: the copy of a checkpoint waits for an
event of the training stream, and the optimizer waits for the copy; batches are copied and used in the training stream, and the
caching allocator of page-locked memory keeps their blocks until those copies have ended; marks of time are events of the training
stream, read after a wait that is needed anyway.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def use_device(device: torch.device) -> None:
    """Make a worker's device the current one of this thread; call it in each thread before that touches CUDA.

    A device without a number is the current one already.
    """
    import torch

    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def device_name(device: torch.device) -> str:
    """Return the name of a worker's device: the GPU's, or that of this machine's processor."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of this machine's processor."""
    try:
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "CPU"
