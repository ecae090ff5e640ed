"""Milliseconds that a rank of 64 waits for its batches at the end of an epoch, and for the first batch of a run.

The data set has as many images as COCO and is really read; a step is a pause. It is compared with an earlier design: a
plan whose sizes are drawn one by one, and a pool of threads for every epoch.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from detr.batch import collate
from detr.geometry import draw_geometry
from pipeline.config import RunConfig
from pipeline.data.loader import training_batches, training_transform
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from shards.arrays import Ints
from shards.config import ReadConfig
from shards.dataset.manifest import Manifest, load_manifest
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader
from tests.bench.simulated import write_simulated

Row = dict[str, Any]
RANKS, STEP_S, STEPS = Ranks(17, 64), 0.1, 12


def streaming(device: str, rounds: int) -> list[Row]:
    """Measure waits around the end of the first epoch, and for the first batch at both ends of a run."""
    config = RunConfig()
    config = replace(config, optim=replace(config.optim, batch_size=256))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        manifest = load_manifest(write_simulated(Path(folder)))
        manifest.index()
        schedule = Schedule(config.optim, manifest.images)
        for name, batches in (("one stream", training_batches), ("a loader per epoch", _loader_per_epoch)):
            found = [_waits(batches, manifest, config, schedule) for _ in range(rounds)]
            usual, end = (median(waits[key] for waits in found) for key in (0, 1))
            rows.append({"case": "epoch's end", "side": name, "usual_ms": usual, "end_ms": end})
            print(
                f"epoch's end, {name:20} longest wait {end:7.1f} ms, median of the other steps {usual:5.1f} ms",
                flush=True,
            )
        ends = (0, schedule.steps(299) - 1)
        # In turn, so that other load of the machine affects both.
        firsts = [[_first(manifest, config, schedule, step) for step in ends] for _ in range(2 * rounds)]
        for step, found_ms in zip(ends, zip(*firsts, strict=True), strict=True):
            rows.append({"case": "first batch", "side": f"at step {step}", "ms": median(found_ms)})
            print(
                f"first batch at step {step:>7}: {median(found_ms):6.1f} ms, best {min(found_ms):6.1f} ms", flush=True
            )
    return rows


def _waits(
    batches: Callable[..., Iterator[Any]], manifest: Manifest, config: RunConfig, schedule: Schedule
) -> tuple[float, float]:
    """Return the median wait of the steps around the end of the epoch, and the longest at it, in milliseconds."""
    end = schedule.steps(1)
    waits = []
    stream = batches(manifest, config, schedule, RANKS, end - STEPS, end + STEPS)
    for _ in range(2 * STEPS):
        start = time.perf_counter()
        next(stream)
        waits.append((time.perf_counter() - start) * 1e3)
        time.sleep(STEP_S)
    stream.close()  # type: ignore[attr-defined]
    return median(waits[1:]), max(waits[STEPS - 2 : STEPS + 3])


def _first(manifest: Manifest, config: RunConfig, schedule: Schedule, step: int) -> float:
    start = time.perf_counter()
    stream = training_batches(manifest, config, schedule, RANKS, step, schedule.total_steps)
    next(stream)
    seconds = time.perf_counter() - start
    stream.close()
    return seconds * 1e3


def _loader_per_epoch(
    manifest: Manifest, config: RunConfig, schedule: Schedule, ranks: Ranks, step: int, until: int
) -> Iterator[Any]:
    images = manifest.index().images

    def sizes(rows: Ints, epochs: Ints) -> tuple[Ints, Ints]:
        drawn = [
            draw_geometry(
                config.seed, epoch, int(image["image_id"]), int(image["width"]), int(image["height"]), config.transform
            ).size
            for epoch, image in zip(epochs.tolist(), images[rows], strict=True)
        ]
        heights, widths = np.array(drawn).T
        return heights, widths

    while step < until:
        plan = plan_epoch(
            manifest, seed=config.seed, epoch=schedule.epoch_of(step), batch_size=config.optim.batch_size, sizes=sizes
        )
        loader = open_loader(
            manifest,
            plan,
            rank=ranks.rank,
            world_size=ranks.world_size,
            start_step=step,
            transform=training_transform(config.seed, config.transform),
            collate=collate,
            config=ReadConfig(threads=2, prefetch=4),
        )
        for batch in loader:
            yield batch
            step += 1
