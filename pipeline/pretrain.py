"""Weights for the tiny backbone of the built-in demo, which no one has trained on ImageNet.

The paper starts from a ResNet trained to classify ImageNet. Here the backbone alone learns to name what covers the
centre of each of its cells, on the training images themselves and from their boxes. This stands where ImageNet weights
stand in the paper, and what DETR does with it afterwards is the same: batch norm, trained here, is frozen from then on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
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

_BATCH_SIZE = 32
_LEARNING_RATE = 4e-3
_WARMUP = 0.1  # of all steps
_POINTS = 4  # per side of a cell

# (steps done, steps in all, loss of the last one); called after every step.
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Pretraining:
    """How it went: steps, cross entropy per cell, and the share of cells named rightly over the last epoch, 0 to 1."""

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
    epochs: int = 4,
    progress: Progress | None = None,
) -> Pretraining:
    """Train the backbone of `model_config` on the images of `manifest` and write it for `load_backbone_weights`.

    Stands where ImageNet weights stand in the paper. Every cell of the backbone's output is classified from its own
    features: the class of the smallest box over its centre, or background. Frozen batch norm is trained here.

    out_path: a safetensors file, written aside and renamed. The same arguments give the same bytes on one machine.
    """
    norm = "batch" if model_config.norm == "frozen_batch" else model_config.norm
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        body = ResNet(replace(model_config, norm=norm))
        head = nn.Conv2d(body.channels, (manifest.num_classes + 1) * _POINTS**2, 1)
    model = nn.Sequential(body, head).to(memory_format=torch.channels_last)  # 1.2x as fast on a CPU
    steps = -(-epochs * manifest.images // _BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps, pct_start=_WARMUP)
    last_epoch: list[tuple[float, float]] = []
    for step, batch in enumerate(_batches(manifest, transform_config, seed, epochs), start=1):
        images = normalise(batch, transform_config).contiguous(memory_format=torch.channels_last)
        logits = F.pixel_shuffle(model(images), _POINTS)
        labels = cell_labels(batch.targets, logits.shape[2], logits.shape[3], background=manifest.num_classes)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step > steps - manifest.images // _BATCH_SIZE:
            last_epoch.append((loss.item(), (logits.argmax(1) == labels).float().mean().item()))
        if progress:
            progress(step, steps, loss.item())
    path = Path(out_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save({name: value.contiguous() for name, value in body.state_dict().items()}))
    loss_mean, accuracy = torch.tensor(last_epoch, dtype=torch.float64).mean(0).tolist()
    return Pretraining(steps, loss_mean, accuracy)


def cell_labels(targets: Sequence[Target], height: int, width: int, *, background: int) -> Tensor:
    """Int64 [B, height, width]: the label of the smallest box that covers each cell's centre, else `background`."""
    labels = torch.full((len(targets), height, width), background)
    rows = ((torch.arange(height) + 0.5) / height)[:, None]
    columns = (torch.arange(width) + 0.5) / width
    for cells, target in zip(labels, targets, strict=True):
        # From large to small, so that a small object in front of a large one is what a cell learns.
        for index in target.boxes[:, 2:].prod(1).argsort(descending=True, stable=True).tolist():
            x, y, w, h = target.boxes[index].tolist()
            covered = ((rows - y).abs() < h / 2) & ((columns - x).abs() < w / 2)
            cells[covered] = target.labels[index]
    return labels


def _batches(manifest: Manifest, transform_config: TransformConfig, seed: int, epochs: int) -> Iterator[Batch]:
    for epoch in range(epochs):
        plan = plan_epoch(manifest, seed=seed, epoch=epoch, batch_size=_BATCH_SIZE, epochs=epochs)
        transform = training_transform(seed, transform_config)
        yield from open_loader(manifest, plan, transform=transform, collate=collate, config=ReadConfig(threads=1))
