"""AP after 300 epochs on a small real data set, that of training, from random weights: evidence that a device learns.

The data are `DETR_COCO_TINY` or, without it, the built-in shapes. Each evaluation is a row, so a stop loses the later ones only.
"""

import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from detr.model import build_model
from pipeline.config import CheckpointConfig, DataConfig, RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.recipes import RECIPES
from pipeline.training.loop import run as train
from pipeline.training.model import save_initial
from pipeline.training.state import RunInfo
from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco
from tests.gpu.results import Results
from tests.gpu.work import Setting
from tests.support.real_data import COCO_TINY
from tests.support.tracker import MemoryTracker


class _Writing(MemoryTracker):
    """Tracker that writes a row for each evaluation."""

    def __init__(self, results: Results, title: str) -> None:
        super().__init__()
        self._results, self._title, self._start = results, title, time.perf_counter()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        super().metrics(values, step)
        if "val/AP" in values:
            row = {name: values[f"val/{name}"] for name in ("AP", "AP50")}
            epoch, took = values["evaluation/epoch"], time.perf_counter() - self._start
            self._results.put(self._title, epoch=epoch, **row, seconds=took)


def run(results: Results, setting: Setting) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"DETR_CACHE": f"{name}/cache", "DETR_SCRATCH": f"{name}/scratch"}
        root = Path(name)
        title = _write(root, setting)
        config = _config(root, setting)
        torch.manual_seed(config.seed)
        save_initial(build_model(config.model, load_manifest(config.data.train).num_classes), root)
        train(
            config, RunInfo("run", root, "commit"), Ranks(device=torch.device(setting.device)), _Writing(results, title)
        )


def _write(root: Path, setting: Setting) -> str:
    """Write the data set and return its name."""
    if COCO_TINY.exists() and not setting.tiny:
        images, annotations = COCO_TINY / "val2017", COCO_TINY / "annotations" / "instances_val2017.json"
        title = "80 images of COCO"
    else:
        split = write_synthetic(root / "coco", train=4 if setting.tiny else 80, val=1, size=64).train
        images, annotations, title = split.images, split.annotations, "built-in shapes"
    write_coco(images, annotations, root / "train", WriteConfig(samples_per_shard=20))
    return title


def _config(root: Path, setting: Setting) -> RunConfig:
    base = RECIPES["overfit"]
    data = DataConfig(train=str(root / "train"), val=str(root / "train"), reader_threads=1 if setting.tiny else 8)
    config = replace(
        base,
        data=data,
        optim=replace(base.optim, epochs=300),
        evaluate=replace(base.evaluate, every=50, batch_size=8, pictures=0, explain=False),
        checkpoint=CheckpointConfig(every_steps=0),
    )
    if setting.tiny:
        small = replace(
            config.model, backbone="tiny", hidden_dim=32, heads=2, feedforward_dim=32, num_queries=9, encoder_layers=1
        )
        config = replace(
            config,
            model=replace(small, decoder_layers=2),
            transform=replace(config.transform, train_scales=(64,), max_size=64, eval_size=64),
            optim=replace(config.optim, batch_size=2, epochs=2, decay_epoch=1),
            evaluate=replace(config.evaluate, every=1),
        )
    return config
