"""AdamW in two parameter groups, the backbone and the rest, and their learning rates (appendix A.4 of the paper)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over two groups: the backbone at `lr_backbone`, everything else at `lr`.

    Frozen parameters are left out. Raise `ValueError` if `lr_backbone` is 0 and the backbone is not frozen, which
    `build_trainable_model` does before the model is wrapped.
    """
    backbone: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "backbone" in name:
            if config.lr_backbone == 0:
                raise ValueError(f"optim.lr_backbone 0: got a trainable {name}, expected a frozen backbone")
            backbone.append(parameter)
        else:
            others.append(parameter)
    groups: list[dict[str, Any]] = [{"params": others, "lr": config.lr, "base_lr": config.lr}]
    if backbone:
        groups.append({"params": backbone, "lr": config.lr_backbone, "base_lr": config.lr_backbone})
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
