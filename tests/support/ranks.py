"""Real processes that speak gloo, for tests of what several ranks do together.

They fork from a server that has imported torch once, so a rank costs a fraction of a second and no state of the tests.
"""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.distributed.ranks import Ranks

_TIMEOUT_S = 180


def run_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = _TIMEOUT_S
) -> list[Any]:
    """Return the results of `function(Ranks, *arguments)`, a module's function, of each rank, in order of rank.

    The first failure is raised here with its traceback; the other ranks are ended. So they are when none of them says
    anything for `timeout_s`.
    """
    with started_ranks(world_size, function, *arguments, timeout_s=timeout_s) as (_, receivers):
        return _collect(receivers, timeout_s)


def on_two_nodes(ranks: "Ranks") -> "Ranks":
    """Return the ranks as if they were on two nodes in turns, so that neighbours are not on the same one."""
    return replace(ranks, node=f"node {ranks.rank % 2}")


@contextmanager
def started_ranks(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = _TIMEOUT_S
) -> Iterator[tuple[list[BaseProcess], list[Connection]]]:
    """The processes of `run_ranks`, and what each one's answer comes through; they are ended with the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pipeline.training.loop"])
    with tempfile.TemporaryDirectory() as folder:
        pairs = [context.Pipe(duplex=False) for _ in range(world_size)]
        processes: list[BaseProcess] = [
            context.Process(target=_rank, args=(rank, world_size, folder, sender, timeout_s, function, arguments))
            for rank, (_, sender) in enumerate(pairs)
        ]
        try:
            for process, (_, sender) in zip(processes, pairs, strict=True):
                process.start()
                sender.close()
            yield processes, [receiver for receiver, _ in pairs]
        finally:
            for process in processes:
                process.join(5)
                process.kill()
                process.join()
            for receiver, _ in pairs:
                receiver.close()


def _collect(receivers: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(receivers):
        waiting = [receiver for rank, receiver in enumerate(receivers) if rank not in results]
        ready = wait(waiting, timeout_s)
        if not ready:
            raise TimeoutError(f"{len(waiting)} of {len(receivers)} ranks sent nothing for {timeout_s} s")
        for receiver in ready:
            rank = receivers.index(receiver)  # type: ignore[arg-type]
            try:
                done, results[rank] = pickle.loads(receiver.recv_bytes())  # type: ignore[union-attr]  # noqa: S301
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a word") from None
            if not done:
                raise RuntimeError(f"rank {rank} failed:\n{results[rank]}")
    return [results[rank] for rank in range(len(receivers))]


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    sender: Connection,
    timeout_s: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    from pipeline.distributed.ranks import Ranks

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
        )
        # As bytes: torch would send a tensor as a handle that dies with this process.
        sender.send_bytes(pickle.dumps((True, function(Ranks(rank, world_size), *arguments))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
