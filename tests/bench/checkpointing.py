"""Seconds that training waits for a checkpoint of R50 with AdamW, asynchronous and synchronous.

Real training steps come between the saves. Their images are small, so that a step is short and hides little.
"""

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detr.batch import Batch
from pipeline.checkpoint import catalog
from pipeline.checkpoint.pruning import prune
from pipeline.checkpoint.saver import Saver
from pipeline.distributed.ranks import Ranks
from pipeline.recipes import RECIPES
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.bench import cases
from tests.support.checkpoints import meta, save_checkpoint

IMAGES, SIDE = 2, 256
Row = dict[str, Any]


def checkpointing(device: str, rounds: int) -> list[Row]:
    """Measure the seconds that training waits per save: the median of `rounds` saves each way, alternating."""
    config = RECIPES["detr-r50"]
    config = replace(config, model=replace(config.model, backbone_weights="random"))
    ranks = Ranks(device=torch.device(device))
    model = build_trainable_model(config, cases.CLASSES).to(ranks.device)
    optimizer = build_optimizer(model, config.optim)
    images = torch.randint(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=torch.uint8)
    batch = Batch(images, None, tuple(cases.targets(IMAGES, 7)), ((SIDE, SIDE),) * IMAGES)
    number = 0

    def step() -> float:
        nonlocal number
        number += 1
        start = time.perf_counter()
        train_step(model, [batch], optimizer, config, ranks, number)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    waited, blocked, plain, beside = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder) / "beside", optimizer, ranks, keep=1)
        step()
        for _ in range(rounds + 1):  # the first warms up
            plain += [step(), step()]
            start = time.perf_counter()
            save_checkpoint(Path(folder) / "waited", model, optimizer, meta(number), ranks)
            waited.append(time.perf_counter() - start)
            prune(catalog.Shelf(Path(folder) / "waited").look(), keep=1)
            before = saver.stalled_s
            saver.save(model, optimizer, meta(number))
            while saver.under_way:
                beside.append(step())
            saver.finish()
            blocked.append(saver.stalled_s - before)
        saver.close()
        size = sum(file.stat().st_size for file in Path(folder).glob("beside/checkpoints/*/*"))
    asynchronous, synchronous = (statistics.median(found[1:]) for found in (blocked, waited))
    title = f"checkpoint of R50 and AdamW, {size / 2**20:.0f} MiB"
    print(
        f"{title}: training waits {synchronous * 1e3:.0f} ms for a synchronous save, {asynchronous * 1e3:.1f} ms for an "
        f"asynchronous one ({asynchronous / synchronous:.1%}); a step takes {statistics.median(plain) * 1e3:.0f} ms, "
        f"{statistics.median(beside) * 1e3:.0f} ms beside a save",
        flush=True,
    )
    sides = {"synchronous": waited[1:], "asynchronous": blocked[1:]}
    return [{"case": title, "side": side, "blocked_s": found} for side, found in sides.items()] + [
        {"case": title, "side": side, "step_s": found} for side, found in {"alone": plain, "beside": beside}.items()
    ]
