"""AdamW in groups of parameters, the backbone and the rest, and their learning rates (appendix A.4 of the paper).

Deformable DETR has a third group: the layers that predict where to sample.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from pipeline.config import OptimConfig

_POINTS = ("reference_points", "sampling_offsets")


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the backbone at `lr_backbone`, sampling points at `lr * points_factor`, all others at `lr`.

    The group of the others comes first; a group without parameters is left out, and so are frozen parameters. Raise
    `ValueError` if `lr_backbone` is 0 and the backbone is not frozen, which `build_trainable_model` does before the model
    is wrapped.
    """
    rates = {"main": config.lr, "backbone": config.lr_backbone, "points": config.lr * config.points_factor}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = group_of(name)
        if group == "backbone" and config.lr_backbone == 0:
            raise ValueError(f"optim.lr_backbone 0: got a trainable {name}, expected a frozen backbone")
        members[group].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": members[name], "lr": rate, "base_lr": rate}
        for name, rate in rates.items()
        if members[name] or name == "main"
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def group_of(parameter: str) -> Literal["main", "backbone", "points"]:
    """Return the group of a parameter by its name, as the originals of the variants choose it."""
    if "backbone" in parameter:
        return "backbone"
    return "points" if any(name in parameter for name in _POINTS) else "main"


def learning_rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the rate of each group that has parameters, by the group's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [group for group in optimizer.param_groups if group["params"]]
    return {group_of(names[id(group["params"][0])]): group["lr"] for group in groups}


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
