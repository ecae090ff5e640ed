"""Seconds and memory of the plan of an epoch, by the number of images, and of one of 1,024 ranks; and padding.

Memory is measured in separate processes, beyond that of their imports.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from detr.config import TransformConfig
from detr.geometry import draw_geometry, output_sizes
from pipeline.config import RunConfig
from pipeline.data.loader import rank_slices
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from shards.config import PlanConfig
from shards.dataset.manifest import load_manifest
from shards.plan.epoch import EpochPlan, Sizes, plan_epoch
from tests.bench.simulated import COCO_IMAGES, plain, real_sizes, write_simulated

Row = dict[str, Any]
RANKS, PER_RANK = 1024, 4
GROWTH = (COCO_IMAGES, 1_000_000, 4_000_000)
MANY = 100_000_000


def planning(device: str, rounds: int) -> list[Row]:
    """Measure seconds and memory of an epoch's plan on one of 1,024 ranks, and their growth with the images."""
    rows = [_time(name, COCO_IMAGES, rounds) for name in KINDS]
    with tempfile.TemporaryDirectory() as folder:
        found = _in_its_own_process("--rank", str(write_simulated(Path(folder))))
    rows.append({"case": "plan", "side": f"one rank of {RANKS}, index included", **found})
    print(f"plan, {rows[-1]['side']:44} " + ", ".join(f"{name} {value:.3g}" for name, value in found.items()))
    growth = [_in_its_own_process("--images", str(images)) for images in GROWTH]
    for images, figures in zip(GROWTH, growth, strict=True):
        rows.append({"case": "plan", "side": f"{images:,} images", **figures})
        print(
            f"plan, {images:>11,} images: {figures['seconds']:.3f} s, peak {figures['peak_mb']:.0f} MB, kept {figures['kept_mb']:.0f} MB"
        )
    seconds, peak, kept = (_slope([figures[name] for figures in growth]) for name in ("seconds", "peak_mb", "kept_mb"))
    rows.append(
        {"case": "plan", "side": "per sample", "us": seconds * 1e6, "peak_bytes": peak * 1e6, "bytes": kept * 1e6}
    )
    print(
        f"plan, per sample: {seconds * 1e6:.2f} us, peak {peak * 1e6:.0f} bytes, kept {kept * 1e6:.0f} bytes; so "
        f"{MANY:,} samples: {seconds * MANY:.0f} s, peak {peak * MANY / 1e3:.1f} GB, kept {kept * MANY / 1e3:.1f} GB"
    )
    return rows


def padding(device: str, rounds: int) -> list[Row]:
    """Measure the padded pixels, the largest rank's canvas over the mean, and the canvas shapes of 16 ranks of 4."""
    rows = []
    sides = [("as they come", None, 1)] + [(f"sorted in windows of {window}", _sizes, window) for window in (1, 4, 16)]
    for name, sizes, window in sides:
        heights, widths = _canvases(sizes, PlanConfig(sort_window=window))
        h, w = heights.max(-1), widths.max(-1)
        share = 1 - (heights * widths).sum() / (h * w * PER_RANK).sum()
        uneven = float(((h * w).max(-1) / (h * w).mean(-1)).mean())
        shapes = {multiple: _shapes(h, w, multiple) for multiple in (1, 32, 64, 128)}
        rows.append({"case": "padding", "side": name, "padding": float(share), "largest_over_mean": uneven, **shapes})
        print(
            f"padding, 16 x {PER_RANK}, {name:24} {share:6.1%} of the pixels, largest rank {uneven:.2f} of the mean, canvas "
            f"shapes by multiple {shapes}",
            flush=True,
        )
    return rows


def _shapes(heights: np.ndarray, widths: np.ndarray, multiple: int) -> int:
    canvases = np.ceil(np.stack([heights.ravel(), widths.ravel()], 1) / multiple)
    return len(np.unique(canvases, axis=0))


def _canvases(sizes: Sizes | None, config: PlanConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return heights and widths [steps, 16 ranks, 4] of an epoch of as many images as COCO has, of real sizes."""
    batch_size = 16 * PER_RANK
    plan = _plan(COCO_IMAGES, sizes, config, batch_size)
    full = len(plan.rows) // batch_size * batch_size
    heights, widths = _sizes(plan.rows[:full], plan.epochs[:full])
    return heights.reshape(-1, 16, PER_RANK), widths.reshape(-1, 16, PER_RANK)


def _sizes(rows: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    widths, heights = real_sizes()
    which = rows % len(widths)
    return output_sizes(42, epochs, rows, widths[which], heights[which], _TRANSFORM)


def _sizes_one_by_one(rows: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    widths, heights = real_sizes()
    which = rows % len(widths)
    drawn = [
        draw_geometry(42, epoch, row, width, height, _TRANSFORM).size
        for epoch, row, width, height in zip(
            *(part.tolist() for part in (epochs, rows, widths[which], heights[which])), strict=True
        )
    ]
    heights, widths = np.array(drawn).T
    return heights, widths


_TRANSFORM = TransformConfig()
KINDS: dict[str, tuple[Sizes | None, PlanConfig, int]] = {
    "order alone": (None, PlanConfig(), 64),
    "sorted": (_sizes, PlanConfig(), 64),
    "sorted, windows of 16": (_sizes, PlanConfig(sort_window=16), 64),
    "sorted, blocks of 30 shards": (_sizes, PlanConfig(shuffle_shards=30), 64),
    "sorted, sizes one by one": (_sizes_one_by_one, PlanConfig(), 64),
    f"sorted, {RANKS} ranks of {PER_RANK}": (_sizes, PlanConfig(), RANKS * PER_RANK),
}


def _plan(images: int, sizes: Sizes | None, config: PlanConfig, batch_size: int) -> EpochPlan:
    return plan_epoch(plain(images), seed=42, epoch=0, batch_size=batch_size, sizes=sizes, config=config)


def _time(kind: str, images: int, rounds: int) -> Row:
    seconds = [_seconds(lambda: _plan(images, *KINDS[kind])) for _ in range(rounds + 1)][1:]
    row = {"case": "plan", "side": kind, "median_s": median(seconds), "best_s": min(seconds)}
    print(f"plan, {images:,} images, {kind:30} median {row['median_s']:.3f} s, best {row['best_s']:.3f} s", flush=True)
    return row


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _slope(values: list[float]) -> float:
    """Return the growth per image, between the smallest and the largest number of images."""
    return (values[-1] - values[0]) / (GROWTH[-1] - GROWTH[0])


def _in_its_own_process(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.planning", *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # type: ignore[no-any-return]


def _rank(folder: str) -> dict[str, float]:
    """Return seconds and memory of a rank's slices of 40 steps across the end of an epoch: two plans at once."""
    before = _memory()
    manifest = load_manifest(folder)
    config = RunConfig()
    config = replace(config, optim=replace(config.optim, batch_size=RANKS * PER_RANK))
    schedule = Schedule(config.optim, manifest.images)
    seconds = _seconds(lambda: next(rank_slices(manifest, config, schedule, Ranks(777, RANKS), 5, 60)))
    for _ in rank_slices(manifest, config, schedule, Ranks(777, RANKS), 5, 60):
        pass
    after = _memory()
    return {"first_slice_s": seconds} | {f"{name}_mb": (after[name] - before[name]) / 1e6 for name in after}


def _grown(images: int) -> dict[str, float]:
    _plan(1000, _sizes, PlanConfig(), 64)
    before = _memory()
    start = time.process_time()
    plan = _plan(images, _sizes, PlanConfig(), 64)
    seconds = time.process_time() - start
    after = _memory()
    assert len(plan.rows)
    return {
        "seconds": seconds,
        "peak_mb": (after["peak"] - before["resident"]) / 1e6,
        "kept_mb": (after["resident"] - before["resident"]) / 1e6,
    }


def _memory() -> dict[str, int]:
    """Return bytes of this process: resident, private, and the peak of the resident ones since the last call."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    kinds = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    own = sum(1024 * int(kinds[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))
    resident, peak = (1024 * int(status.split(f"{name}:")[1].split()[0]) for name in ("VmRSS", "VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return {"resident": resident, "own": own, "peak": peak}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", metavar="FOLDER")
    parser.add_argument("--images", type=int)
    options = parser.parse_args()
    print(json.dumps(_rank(options.rank) if options.rank else _grown(options.images)))
