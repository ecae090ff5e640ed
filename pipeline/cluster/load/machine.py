"""Load of this machine, under MLflow's names of system metrics."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipeline.distributed.devices import use_device
from shards.errors import one_line

if TYPE_CHECKING:
    from torch import device

LOG = logging.getLogger(__name__)
_MB = 1e6


class Machine:
    """CPU, memory, disk and network of this machine; `disk` is a path on the disk that is measured."""

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        psutil.cpu_percent()  # the first call measures nothing
        self._before = self._transferred()

    def sample(self) -> dict[str, float]:
        """Return the load now; of CPU and network, the mean since the last sample."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._disk))
        (then, received_then, sent_then), (now, received, sent) = self._before, self._transferred()
        self._before = now, received, sent
        seconds = max(now - then, 1e-3)
        return {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": (memory.total - memory.available) / _MB,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MB,
            "network_receive_megabytes_per_s": (received - received_then) / _MB / seconds,
            "network_transmit_megabytes_per_s": (sent - sent_then) / _MB / seconds,
        }

    @staticmethod
    def _transferred() -> tuple[float, int, int]:
        """Return the time and the bytes received and sent so far; none where the machine does not show them."""
        counters = psutil.net_io_counters()
        return (time.monotonic(), counters.bytes_recv, counters.bytes_sent) if counters else (time.monotonic(), 0, 0)


def gpu_load(which: device, number: str) -> dict[str, float]:
    """Return the load of the GPU that this process trains on; `number` is its number on the machine.

    Utilization and power need nvidia-ml-py; without it, or where the driver does not tell them, there is the memory.
    """
    import torch

    use_device(which)  # in the thread of the load
    free, total = torch.cuda.mem_get_info(which)
    used = total - free
    found = {"memory_usage_megabytes": used / _MB, "memory_usage_percentage": 100 * used / total}
    with suppress(ImportError, RuntimeError):
        found["utilization_percentage"] = float(torch.cuda.utilization(which))
        found["power_usage_watts"] = torch.cuda.power_draw(which) / 1000
    return {f"gpu_{number}_{name}": value for name, value in found.items()}


def sampler(disk: Path, which: device, number: str, *, whole: bool) -> Callable[[], dict[str, float]]:
    """Return a function that returns the load by name, `NODE/...`: of the GPU of this process, and of its machine if `whole`.

    `disk` is a path on the disk that is measured.
    """
    node = machine_name()
    machine = _readable(disk) if whole else None

    def sample() -> dict[str, float]:
        found = machine.sample() if machine else {}
        if which.type == "cuda":
            found |= gpu_load(which, number)
        return {f"{node}/{name}": value for name, value in found.items()}

    return sample


def _readable(disk: Path) -> Machine | None:
    """Return the machine; None in a container that hides its figures, which no run ends for."""
    try:
        return Machine(disk)
    except (OSError, psutil.Error, RuntimeError) as error:
        LOG.warning("the load of this node cannot be read: %s", one_line(error))
        return None


def machine_name() -> str:
    """Return the name of this machine as it may stand in a metric's name."""
    return re.sub(r"[^\w.-]", "-", socket.gethostname(), flags=re.ASCII)
