"""CPU seconds per image of this package's loaders and the original's, from files to padded batches.

Each side runs in a process of its own. CPU time and not wall time, because loaders compete with training for the host's
cores; it counts threads and worker processes alike. The original hands over normalised floats. Here images stay bytes
until they are on the device, which normalises them; what that would cost on this CPU is a row of its own.

`DETR_COCO_TINY` names a folder with real COCO images (`train2017`, `annotations/instances_train2017.json`).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tests.bench import peer
from tests.support.real_data import COCO_TINY as COCO

BATCH = 4
EPOCHS = 4
ORIGINAL = "original, 2 workers"


def loading(device: str, rounds: int) -> list[dict[str, Any]]:
    """Measure the training loader's CPU time per image at batch 4, relative to the original's."""
    sides = [side for side in SIDES if not (side.startswith("original") and peer.missing())]
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder))
        found: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                found[side].append(_measure(side, folder))
    reference = found.get(ORIGINAL, found["parity, 2 threads"])
    rows = []
    for side in sides:
        ratio = median(theirs / mine for theirs, mine in zip(reference, found[side], strict=True))
        rows.append({"case": "loader", "side": side, "cpu_ms": median(found[side]), "ratio": ratio})
        print(
            f"loader, batch {BATCH:<3} {side:34} {median(found[side]):6.2f} CPU ms per image, {ratio:5.1f}x", flush=True
        )
    return rows


def _write(folder: Path) -> None:
    from shards.write.writer import write_coco

    write_coco(COCO / "train2017", COCO / "annotations" / "instances_train2017.json", folder / "shards")


def _measure(side: str, folder: str) -> float:
    command = [sys.executable, "-m", "tests.bench.loading", "--side", side, "--folder", folder]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return float(json.loads(done.stdout.split(b"\n")[-2])["cpu_ms"])


def _ours(pixels: str, threads: int, normalised: bool = False) -> Callable[[Path], Iterator[int]]:
    def run(folder: Path) -> Iterator[int]:
        from detr.batch import normalise
        from pipeline.config import RunConfig
        from pipeline.data.loader import training_batches
        from pipeline.distributed.ranks import Ranks
        from pipeline.schedule import Schedule
        from shards.dataset.manifest import load_manifest

        manifest = load_manifest(folder / "shards")
        config = RunConfig()
        config = replace(
            config,
            data=replace(config.data, reader_threads=threads),
            optim=replace(config.optim, batch_size=BATCH),
            transform=replace(config.transform, pixels=pixels),
        )
        steps = EPOCHS * manifest.images // BATCH
        schedule = Schedule(config.optim, manifest.images)
        for (batch,) in training_batches(manifest, config, schedule, Ranks(), 0, steps):
            if normalised:
                normalise(batch, config.transform)
            yield len(batch)

    return run


def _decode(folder: Path) -> Iterator[int]:
    import numpy as np

    from shards.config import ReadConfig
    from shards.dataset.manifest import load_manifest
    from shards.read.loader import read_samples

    manifest = load_manifest(folder / "shards")
    for _ in range(EPOCHS):
        for _ in read_samples(manifest, np.arange(manifest.images), ReadConfig(threads=0)):
            yield 1


def _original(workers: int) -> Callable[[Path], Iterator[int]]:
    def run(folder: Path) -> Iterator[int]:
        for _ in range(EPOCHS):
            for images, _ in peer.training_loader(COCO, BATCH, workers):
                yield len(images.tensors)

    return run


SIDES: dict[str, Callable[[Path], Iterator[int]]] = {
    ORIGINAL: _original(2),
    "original, in its own process": _original(0),
    "parity, 2 threads": _ours("parity", 2),
    "fast, 2 threads": _ours("fast", 2),
    "fast, 2 threads, normalised": _ours("fast", 2, normalised=True),
    "reading and decoding alone": _decode,
}


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=SIDES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    batches = SIDES[options.side](options.folder)
    next(batches)  # imports, the index, the JSON
    start, images = _cpu_seconds(), 0
    for count in batches:
        images += count
    print(json.dumps({"cpu_ms": (_cpu_seconds() - start) / images * 1e3, "images": images}))


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process, its threads, and its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    _main()
