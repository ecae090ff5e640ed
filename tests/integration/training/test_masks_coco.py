"""Masks of real COCO images on their way into training: augmented with their boxes, and learned from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from detr.config import TransformConfig
from pipeline.config import DataConfig, RunConfig
from pipeline.data.loader import training_batches
from pipeline.distributed.ranks import Ranks
from pipeline.driver.preflight import prepare
from pipeline.schedule import Schedule
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from shards.config import WriteConfig
from shards.dataset.manifest import Manifest
from shards.score.coco_eval import MASK_METRICS
from shards.write.writer import write_coco
from tests.support.real_data import COCO_TINY
from tests.support.tracker import MemoryTracker

pytestmark = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)


def shards_of(folder: Path, limit: int) -> Manifest:
    annotations = COCO_TINY / "annotations" / "instances_train2017.json"
    return write_coco(COCO_TINY / "train2017", annotations, folder, WriteConfig(limit=limit))


def edges(mask: Tensor) -> NDArray[np.int64]:
    """Return x0, y0, x1, y1 of a mask's pixels."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return np.array([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])


def test_flips_crops_and_resizes_keep_every_mask_in_its_box(masks_config: RunConfig, tmp_path: Path) -> None:
    manifest = shards_of(tmp_path, 0)
    config = replace(masks_config, transform=TransformConfig(train_scales=(160, 240), max_size=400))
    schedule = Schedule(config.optim, manifest.images)
    beyond, off, empty = [], [], 0
    for (batch,) in training_batches(manifest, config, schedule, Ranks(), 0, schedule.total_steps):
        for target, (height, width) in zip(batch.targets, batch.sizes, strict=True):
            assert target.masks is not None
            assert target.masks.shape == (len(target.labels), height, width)
            for mask, box in zip(target.masks, target.boxes, strict=True):
                if not mask.any():
                    empty += 1  # what is left of an object after a crop, or smaller than a pixel after the resize
                    continue
                low, high = (box[:2] - box[2:] / 2).numpy(), (box[:2] + box[2:] / 2).numpy()
                found = edges(mask)
                expected = np.concatenate([low, high]) * np.array([width, height, width, height])
                beyond.append(max(*(expected - found)[:2], *(found - expected)[2:]))
                off.append(np.abs(found - expected).max())
    assert len(off) + empty > 600
    assert empty < 0.05 * len(off)
    assert max(beyond) < 2.5  # pixels: polygons are rasterised up to one beyond their box, and resizes round
    assert np.mean(np.array(off) < 2.5) > 0.9  # a crop can cut a part of the box in which the object is not


def test_masks_of_real_images_are_learned_from_and_scored(masks_config: RunConfig, tmp_path: Path) -> None:
    url = shards_of(tmp_path / "coco", 8).url
    config = replace(
        masks_config,
        model=replace(masks_config.model, num_queries=40, dropout=0.0),
        transform=TransformConfig(train_scales=(96,), max_size=128, eval_size=96, flip=0.0, crop=False),
        data=DataConfig(train=url, val=url, reader_threads=1),
        optim=replace(masks_config.optim, batch_size=8, epochs=12, lr=1e-3, decay_epoch=12),
        evaluate=replace(masks_config.evaluate, every=12, batch_size=4),
    )
    config, ready = prepare(config, lambda line: None)
    ready.write_initial_weights(tmp_path / "run")
    tracker = MemoryTracker()
    torch.manual_seed(0)
    run(config, RunInfo("run", tmp_path / "run", "commit"), Ranks(), tracker)
    losses = [value for name, value, _ in tracker.points if name in ("train/loss_mask", "train/loss_dice")]
    assert len(losses) == 24
    assert sum(losses[-2:]) < 0.9 * sum(losses[:2])
    scored = {name.removeprefix("val/"): value for name, value, step in tracker.points if step == 12}
    assert all(-1 <= scored[name] <= 1 for name in MASK_METRICS)
