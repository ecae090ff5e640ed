"""Weights for the small backbone of the built-in demo, which no one has trained on ImageNet.

The paper starts from a ResNet that has learned to classify ImageNet. Here the backbone alone learns to classify too, on
the training images themselves: each of its cells names what covers each of 4 x 4 points of it. This stands where ImageNet
weights stand in the paper, and DETR goes on from it in the same way: batch norm is trained here and frozen from then on.

Points rather than one name per cell, because a cell then knows where in it an object ends, which boxes need; and a
small batch with a high rate, because 4,000 images are few: 16 at 1e-2 names four fifths of the objects' points rightly
where 32 at 4e-3 names half of them after as many epochs. The first three of five epochs see smaller images, which takes 0.56
of the work and costs nothing of what the demo reaches (AP 0.507 and AP50 0.856); three epochs instead of five do cost it
(0.483 and 0.808).
"""

from __future__ import annotations

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
from pipeline.samples import training_transform
from shards.manifest import Manifest
from shards.plan import plan_epoch
from shards.read import ReadConfig, open_loader
from shards.storage import write_atomic

_BATCH_SIZE = 16
_LEARNING_RATE = 1e-2
_WARMUP = 0.1  # of all steps
_POINTS = 4  # along each side of a cell
_SMALL = 0.6  # of the epochs, the first ones, on smaller images

# (steps done, steps in all, loss of the last one); called after every step.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Pretraining:
    """How it went: steps, mean cross entropy and share of points named rightly (0 to 1) over the last epoch."""

    steps: int
    loss: float
    accuracy: float


def pretrain_backbone(
    manifest: Manifest,
    model_config: ModelConfig,
    transform_config: TransformConfig,
    out_path: str | os.PathLike[str],
    *,
    seed: int,
    epochs: int = 5,
    progress: Progress | None = None,
) -> Pretraining:
    """Train the backbone of `model_config` on the images of `manifest` and write it for `load_backbone_weights`.

    It stands where ImageNet weights stand in the paper. Frozen batch norm is trained here, as trainable batch norm.

    out_path: a safetensors file, written aside and renamed; its folder is made. The same arguments give the same bytes
    on one machine with one number of threads.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        body = ResNet(replace(model_config, norm="batch") if model_config.norm == "frozen_batch" else model_config)
        head = nn.Conv2d(body.channels, (manifest.num_classes + 1) * _POINTS**2, 1)
    model = nn.Sequential(body, head).to(memory_format=torch.channels_last)  # 1.2x as fast on a CPU
    steps = -(-epochs * manifest.images // _BATCH_SIZE)
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
    """Int64 [B, height, width]: the label of the smallest box over each point of an even grid, else `background`."""
    labels = torch.full((len(targets), height, width), background)
    rows = ((torch.arange(height) + 0.5) / height)[:, None]
    columns = (torch.arange(width) + 0.5) / width
    for points, target in zip(labels, targets, strict=True):
        # From large to small, so that of two boxes over a point the smaller one names it.
        for index in target.boxes[:, 2:].prod(1).argsort(descending=True, stable=True).tolist():
            x, y, w, h = target.boxes[index].tolist()
            points[((rows - y).abs() < h / 2) & ((columns - x).abs() < w / 2)] = target.labels[index]
    return labels


@contextmanager
def _threads_beside_the_reader() -> Iterator[None]:
    """One thread fewer while the block runs, which the reader needs: more threads than cores wait for each other.

    Two cores that others use too: 55 ms per step instead of 193.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads - 1, 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(manifest: Manifest, transform_config: TransformConfig, seed: int, epochs: int) -> Iterator[Batch]:
    whole, small = (training_transform(seed, config) for config in (transform_config, _smaller(transform_config)))
    for epoch in range(epochs):
        transform = small if epoch < _SMALL * epochs else whole
        plan = plan_epoch(manifest, seed=seed, epoch=epoch, batch_size=_BATCH_SIZE, epochs=epochs)
        yield from open_loader(manifest, plan, transform=transform, collate=collate, config=ReadConfig(threads=1))


def _smaller(config: TransformConfig) -> TransformConfig:
    """Images of two thirds of each side."""
    scales = tuple(round(scale * 2 / 3) for scale in config.train_scales)
    return replace(config, train_scales=scales, max_size=round(config.max_size * 2 / 3))
