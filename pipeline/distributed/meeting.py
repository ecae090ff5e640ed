"""Trial of the network between nodes: all of them sum a number as checkpoints do, with gloo."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # torch.distributed has it too, but not for type checkers


def open_meeting(address: str, size: int) -> TCPStore:
    """Return a store at a free port of this address of the machine, where `size` processes can meet."""
    return TCPStore(address, 0, size, True, wait_for_workers=False)


def join_meeting(address: str, port: int, size: int, seconds: float) -> TCPStore:
    """Return a client of the store that another process opened; raise an error of torch if it does not answer."""
    return TCPStore(address, port, size, False, timeout=timedelta(seconds=seconds))


def all_reduce_ones(store: TCPStore, rank: int, size: int, seconds: float) -> float:
    """Return the sum of a one of each process; raise an error of torch if it fails. For a process without a group."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=seconds))
    try:
        ones = torch.ones(1)
        dist.all_reduce(ones)
        return float(ones)
    finally:
        dist.destroy_process_group()
