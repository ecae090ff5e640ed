"""Processes that hold each device while workers train, read and save: one per GPU, or a thread has taken a wrong one."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from pipeline.checkpoint.saver import Saver
from pipeline.data.loader import training_batches
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from pipeline.training.model import build_on_device
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from shards.dataset.manifest import load_manifest
from tests.gpu.results import Results
from tests.gpu.whole_run import tiny_run, write_tiny
from tests.gpu.work import Setting
from tests.support.checkpoints import meta

_READY_S = 60


def run(results: Results, setting: Setting) -> None:
    workers = min(torch.cuda.device_count(), 8) if setting.cuda else 1
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"DETR_CACHE": f"{name}/cache", "DETR_SCRATCH": f"{name}/scratch"}
        write_tiny(Path(name), 16)
        context = mp.get_context("spawn")
        queue, done = context.Queue(), context.Event()
        processes = [context.Process(target=_work, args=(rank, name, setting, queue, done)) for rank in range(workers)]
        for process in processes:
            process.start()
        try:
            ready = {queue.get(timeout=_READY_S) for _ in processes}
            holders = _holders() if setting.cuda else {"none": 0}
        finally:
            done.set()
            for process in processes:
                process.join(_READY_S)
    for device, count in holders.items():
        expected = 1 if setting.cuda else 0
        results.put(
            f"processes on {device}", count=count, expected=expected, right=count == expected, workers=len(ready)
        )


def _holders() -> dict[str, int]:
    """Return how many processes hold each GPU, by nvidia-smi; this process holds none, as it only counts them."""
    listed = _smi("--query-gpu=uuid").splitlines()
    apps = [line.partition(",")[0].strip() for line in _smi("--query-compute-apps=gpu_uuid,pid").splitlines()]
    return {f"GPU {number}": apps.count(uuid.strip()) for number, uuid in enumerate(listed)}


def _smi(query: str) -> str:
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout


def _work(rank: int, folder: str, setting: Setting, queue: Any, done: Any) -> None:
    """Train two steps from the loader and save, as a worker does, then hold the device until `done`."""
    device = torch.device("cuda", rank) if setting.cuda else torch.device("cpu")
    if setting.cuda:
        torch.cuda.set_device(device)
    config = tiny_run(Path(folder))
    manifest, ranks = load_manifest(config.data.train), Ranks(device=device)
    model = build_on_device(config, manifest.num_classes, device).train()
    optimizer = build_optimizer(model, config.optim)
    schedule = Schedule(config.optim, manifest.images)
    with Saver(Path(folder) / f"rank-{rank}", optimizer, ranks, keep=1) as saver:
        for step, batches in enumerate(training_batches(manifest, config, schedule, ranks, 0, 2)):
            train_step(model, batches, optimizer, config, ranks, step)
            saver.save(model, optimizer, meta(step + 1), None)
        saver.finish()
        queue.put(rank)
        done.wait(_READY_S)
