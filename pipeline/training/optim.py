"""Optimizer, and the schedule of a run in steps (appendix A.4 of the paper).

The schedule is a pure function of the step, so a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pipeline.config import OptimConfig
from shards.steps import START, EpochTail, Origin, Steps


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over two groups: the backbone at `lr_backbone`, everything else at `lr`.

    If `lr_backbone` is 0, freeze the backbone, as the original does. Frozen parameters are left out.
    """
    backbone: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_backbone = "backbone" in name
        if in_backbone and config.lr_backbone == 0:
            parameter.requires_grad_(False)
        if not parameter.requires_grad:
            continue
        if in_backbone:
            backbone.append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, Any]] = [{"params": others, "lr": config.lr, "base_lr": config.lr}]
    if backbone:
        groups.append({"params": backbone, "lr": config.lr_backbone, "base_lr": config.lr_backbone})
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Durations of a run in steps, converted from epochs by the number of images and the global batch size.

    `origin` is the step and sample from which the stream is divided into steps; not 0 if a resume changed the stream.
    """

    config: OptimConfig
    images: int
    tail: EpochTail = "straddle"
    origin: Origin = START

    @property
    def cut(self) -> Steps:
        """Division of the stream of samples into steps."""
        return Steps(self.images, self.config.batch_size, self.tail, self.origin)

    def steps(self, epochs: float) -> int:
        """Return the first step that starts after `epochs` epochs or later; `epochs` may be fractional."""
        return self.cut.at(math.ceil(epochs * self.images))

    @property
    def total_steps(self) -> int:
        """Number of optimizer steps of the whole run, at least those before `origin`."""
        steps = max(self.steps(self.config.epochs), self.origin.step)
        return min(steps, self.config.max_steps) if self.config.max_steps else steps

    def samples(self, step: int) -> int:
        """Return the number of samples that the first `step` steps consume."""
        return self.cut.position(step)

    def epoch(self, step: int) -> float:
        """Return the number of epochs, with fraction, after the first `step` steps."""
        return min(self.samples(step) / self.images, float(self.config.epochs))

    def epoch_of(self, step: int) -> int:
        """Return the epoch whose plan contains `step`: the last one whose first step is not after it."""
        return self.samples(step) // self.images

    def factor(self, step: int) -> float:
        """Return the factor on both learning rates at `step` (counted from 0).

        It depends on the number of samples, so that it does not jump if a run continues with another batch size.
        """
        config, seen = self.config, self.samples(step)
        warmup, start = config.warmup_epochs * self.images, config.decay_epoch * self.images
        if seen < warmup:
            return min(self.samples(step + 1) / warmup, 1.0)
        if seen < start:
            return 1.0
        if config.decay == "step":
            return config.decay_factor
        last = max(self.samples(self.total_steps - 1), start + 1)
        return 1.0 + (config.decay_factor - 1.0) * min((seen - start) / (last - start), 1.0)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
