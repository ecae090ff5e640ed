"""Wrappers for several ranks: one rank with the device's own backend, and two ranks that share the device."""

import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detr.batch import Batch
from detr.compute import set_channels_last
from pipeline.distributed import parallel
from pipeline.distributed.ranks import Ranks
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.gpu.graphs import graphs_of
from tests.gpu.results import Results
from tests.gpu.steps import run_config
from tests.gpu.work import CLASSES, Setting, batch_of, calm

_STEPS = 4
_JOIN_S = 60


def run(results: Results, setting: Setting) -> None:
    device = torch.device(setting.device)
    expected = _losses("single", Ranks(device=device), setting, _batch(setting))
    results.put("single", losses=expected)
    results.attempt("one rank", lambda: _one_rank(results, setting, device, expected))
    for strategy in ("ddp", "fsdp", "graphs"):
        results.attempt(
            f"{strategy}, two ranks", lambda strategy=strategy: _two_ranks(results, setting, strategy, expected)
        )


def _batch(setting: Setting) -> Batch:
    return batch_of(setting.sizes((480, 640), (512, 600)))


def _losses(strategy: str, ranks: Ranks, setting: Setting, batch: Batch) -> list[float]:
    config = run_config(setting, model={"dropout": 0.0})
    torch.manual_seed(0)
    model: Any = build_trainable_model(config, CLASSES)
    calm(model)
    model.to(ranks.device)
    set_channels_last(model)
    graphed = strategy == "graphs"
    wrapped = parallel.distribute(model, ranks, "ddp" if graphed else strategy, graphs=graphed).train()  # type: ignore[arg-type]
    optimizer = build_optimizer(parallel.unwrap(wrapped), config.optim)
    graphs = graphs_of([batch], wrapped, config, ranks) if graphed else None
    losses = []
    for number in range(_STEPS):
        result = train_step(wrapped, [batch], optimizer, config, ranks, number, graphs=graphs)
        losses.append(float(ranks.sum(result.losses.total.detach().clone())) / ranks.world_size)
    return losses


def _one_rank(results: Results, setting: Setting, device: torch.device, expected: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("nccl" if setting.cuda else "gloo", store=store, rank=0, world_size=1)
        try:
            for strategy in ("ddp", "fsdp"):
                losses = _losses(strategy, Ranks(0, 1, device), setting, _batch(setting))
                results.put(f"{strategy}, one rank", losses=losses, worst=_worst(losses, expected))
        finally:
            dist.destroy_process_group()


def _two_ranks(results: Results, setting: Setting, strategy: str, expected: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("spawn")
        queue = context.SimpleQueue()
        processes = [context.Process(target=_rank, args=(rank, folder, strategy, setting, queue)) for rank in (0, 1)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(_JOIN_S * (3 if not setting.cuda else 1))
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        if hanging or any(process.exitcode for process in processes):
            raise RuntimeError(f"ranks ended with {[process.exitcode for process in processes]}; see the log")
        losses = queue.get()
        results.put(f"{strategy}, two ranks on the device", losses=losses, worst=_worst(losses, expected))


def _rank(rank: int, folder: str, strategy: str, setting: Setting, queue: Any) -> None:
    device = torch.device(setting.device, 0) if setting.cuda else torch.device("cpu")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    losses = _losses(strategy, Ranks(rank, 2, device), setting, _row(_batch(setting), rank))
    if rank == 0:
        queue.put(losses)
    dist.barrier()
    dist.destroy_process_group()


def _row(batch: Batch, row: int) -> Batch:
    """Return one image of the batch, on the same canvas."""
    rows = slice(row, row + 1)
    padding = None if batch.padding is None else batch.padding[rows]
    return Batch(batch.images[rows], padding, batch.targets[rows], batch.sizes[rows])


def _worst(losses: list[float], expected: list[float]) -> float:
    return max(abs(found / other - 1) for found, other in zip(losses, expected, strict=True))
