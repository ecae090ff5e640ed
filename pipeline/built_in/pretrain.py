"""Pre-training of the small backbone of the built-in demo, for which no ImageNet weights exist.

The paper starts from a ResNet that was trained to classify ImageNet. Here the backbone alone is trained to classify, on
the training images themselves: each of its cells predicts the class at each of 4 x 4 points. DETR then starts from it
as it would from ImageNet weights: batch norm is trained here and frozen afterwards.

With points instead of one class per cell, a cell learns where in it an object ends, which boxes need. The batch is
small and the learning rate high, because 4,000 images are few: 16 at 1e-2 classifies four fifths of the objects' points
correctly, 32 at 4e-3 half of them after as many epochs. The first three of five epochs use smaller images: 0.56 of the
work for the same result of the demo (AP 0.507, AP50 0.856). With three epochs instead of five it is worse (0.483,
0.808).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from detr.backbone import ResNet
from detr.batch import Batch, Target, collate, normalise
from detr.config import ModelConfig, TransformConfig
from pipeline.data.loader import training_transform
from shards.config import ReadConfig
from shards.dataset.manifest import Manifest
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader
from shards.store.storage import write_atomic

_BATCH_SIZE = 16
_LEARNING_RATE = 1e-2
_WARMUP = 0.1  # fraction of all steps
_POINTS = 4  # along each side of a cell
_SMALL = 0.6  # fraction of the epochs that use smaller images, from the first one


@dataclass(frozen=True)
class Pretraining:
    """Result of a pre-training."""

    steps: int
    loss: float
    """Mean cross entropy over the last epoch."""
    accuracy: float
    """Fraction of points that were classified correctly over the last epoch, 0 to 1."""


def pretrain_backbone(
    manifest: Manifest,
    model_config: ModelConfig,
    transform_config: TransformConfig,
    out_path: str | os.PathLike[str],
    *,
    seed: int,
    epochs: int = 5,
    progress: Callable[[int, int, float], None] | None = None,
) -> Pretraining:
    """Train the backbone of `model_config` on the images of `manifest` and write it for `load_backbone_weights`.

    Frozen batch norm is trained here as trainable batch norm. `out_path` is a safetensors file, written atomically; its
    folder is created. `progress` is called with (steps done, steps in total, loss of the last step). The same arguments
    give the same bytes on one machine with one number of threads.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        body = ResNet(replace(model_config, norm="batch") if model_config.norm == "frozen_batch" else model_config)
        head = nn.Conv2d(body.channels, (manifest.num_classes + 1) * _POINTS**2, 1)
    model = nn.Sequential(body, head).to(memory_format=torch.channels_last)  # 1.2x as fast on a CPU
    steps = math.ceil(epochs * manifest.images / _BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps, pct_start=_WARMUP)
    last_epoch: list[tuple[float, float]] = []
    with _threads_beside_the_reader():
        for step, batch in enumerate(_batches(manifest, transform_config, seed, epochs), start=1):
            images = normalise(batch, transform_config).contiguous(memory_format=torch.channels_last)
            logits = F.pixel_shuffle(model(images), _POINTS)
            labels = point_labels(batch.targets, logits.shape[2], logits.shape[3], background=manifest.num_classes)
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if steps - step < manifest.images / _BATCH_SIZE:
                last_epoch.append((loss.item(), (logits.argmax(1) == labels).float().mean().item()))
            if progress:
                progress(step, steps, loss.item())
    path = Path(out_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({name: value.contiguous() for name, value in body.state_dict().items()}))
    mean_loss, accuracy = torch.tensor(last_epoch, dtype=torch.float64).mean(0).tolist()
    return Pretraining(steps, mean_loss, accuracy)


def point_labels(targets: Sequence[Target], height: int, width: int, *, background: int) -> Tensor:
    """Return the label at each point of a grid, or `background`: int64 [B, height, width].

    It is that of the mask over the point, or of the smallest box if the targets have no masks.
    """
    labels = torch.full((len(targets), height, width), background)
    rows = ((torch.arange(height) + 0.5) / height)[:, None]
    columns = (torch.arange(width) + 0.5) / width
    for points, target in zip(labels, targets, strict=True):
        if target.masks is not None:
            _, h, w = target.masks.shape
            masks = target.masks[:, (rows * h).long(), (columns * w).long()]
            for mask, label in zip(masks, target.labels, strict=True):
                points[mask] = label
            continue
        # From large to small, so that the smallest box over a point is written last.
        for index in target.boxes[:, 2:].prod(1).argsort(descending=True, stable=True).tolist():
            x, y, w, h = target.boxes[index].tolist()
            points[((rows - y).abs() < h / 2) & ((columns - x).abs() < w / 2)] = target.labels[index]
    return labels


@contextmanager
def _threads_beside_the_reader() -> Iterator[None]:
    """Use one thread less while the block runs, to leave a core to the reader.

    More threads than cores wait for each other: 193 ms per step instead of 55 on two shared cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads - 1, 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(manifest: Manifest, transform_config: TransformConfig, seed: int, epochs: int) -> Iterator[Batch]:
    full_size = training_transform(seed, transform_config)
    small = training_transform(seed, _smaller(transform_config))
    for epoch in range(epochs):
        transform = small if epoch < _SMALL * epochs else full_size
        plan = plan_epoch(manifest, seed=seed, epoch=epoch, batch_size=_BATCH_SIZE, epochs=epochs)
        read = ReadConfig(threads=1, masks=manifest.panoptic)
        yield from open_loader(manifest, plan, transform=transform, collate=collate, config=read)


def _smaller(config: TransformConfig) -> TransformConfig:
    """Return the transform with sizes of two thirds."""
    scales = tuple(round(scale * 2 / 3) for scale in config.train_scales)
    return replace(config, train_scales=scales, max_size=round(config.max_size * 2 / 3))
