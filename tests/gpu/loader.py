"""Images per second that the loader of this machine's cores delivers, to compare with what the device trains."""

import os
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

from detr.config import TransformConfig
from pipeline.config import DataConfig, OptimConfig, RunConfig
from pipeline.data.loader import training_batches
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco
from tests.gpu.results import Results
from tests.gpu.work import Setting

_SECONDS = 6.0


def run(results: Results, setting: Setting) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.environ["DETR_CACHE"] = f"{name}/cache"
        root, images = Path(name), 16 if setting.tiny else 400
        _write(root, images, 64 if setting.tiny else 640)
        for threads in (1, 2) if setting.tiny else (1, 2, 4, 8, 12):
            if threads <= (os.cpu_count() or 1):
                results.attempt(f"{threads} threads", lambda threads=threads: _measure(results, setting, root, threads))


def _write(root: Path, images: int, size: int) -> None:
    made = write_synthetic(root / "coco", train=images, val=2, size=size)
    write_coco(made.train.images, made.train.annotations, root / "train", WriteConfig(samples_per_shard=100))


def _measure(results: Results, setting: Setting, root: Path, threads: int) -> None:
    manifest = load_manifest(str(root / "train"))
    config = RunConfig(
        transform=TransformConfig(train_scales=(64,), max_size=96) if setting.tiny else TransformConfig(),
        data=DataConfig(train=str(root / "train"), reader_threads=threads),
        optim=OptimConfig(batch_size=4, epochs=4),
    )
    schedule = Schedule(config.optim, manifest.images)
    with closing(training_batches(manifest, config, schedule, Ranks(), 0, schedule.total_steps)) as batches:
        warm = sum(len(batch) for step in islice(batches, 2) for batch in step)
        start, images = time.perf_counter(), 0
        for step in batches:
            images += sum(len(batch) for batch in step)
            if time.perf_counter() - start > (1.0 if setting.tiny else _SECONDS):
                break
        took = time.perf_counter() - start
    results.put(f"{threads} reader threads", images_per_s=images / took, images=images, before=warm)
