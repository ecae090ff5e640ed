"""Sections of the optimizer and of steps that are not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detr.config import check_literals
from pipeline.config.checks import require


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, gradient clipping and the learning-rate schedule (appendix A.4 of the paper)."""

    batch_size: int = 64
    """Number of images per optimizer step, over all workers together.
    The learning rates belong to this number: change them together."""
    epochs: int = 300
    """Number of passes over the training data."""
    lr: float = 1e-4
    """Learning rate of everything but the backbone."""
    lr_backbone: float = 1e-5
    """Learning rate of the backbone. 0 freezes it."""
    points_factor: float = 0.1
    """Factor on `lr` for the layers that predict where to sample, in Deformable DETR; above 0."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW, for both learning rates."""
    clip_norm: float = 0.1
    """Maximum L2 norm of the gradient; larger gradients are scaled down to it."""
    decay: Literal["step", "linear"] = "step"
    """Shape of the learning-rate decay.
    step: multiply both rates by `decay_factor` once, at `decay_epoch`.
    linear: go from 1 to `decay_factor` between `decay_epoch` and the last step."""
    decay_epoch: int = 200
    """Epoch at which the decay of the learning rates starts."""
    decay_factor: float = 0.1
    """Factor on both learning rates after the decay, above 0 and at most 1."""
    warmup_epochs: float = 0.0
    """Length of the linear warm-up of both learning rates, in epochs (fractions allowed). 0: none, as in the paper."""
    max_steps: int = 0
    """Maximum number of optimizer steps, for short trials. 0: no limit, `epochs` decides."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, which is then evaluated and registered (such as 0.9997).
    0: off, as in the paper."""
    train: Literal["all", "mask_head"] = "all"
    """Parameters that are trained.
    all: the whole model.
    mask_head: only the mask head, on top of the detector in `initial` (section 4.4 of the paper)."""
    normalise: Literal["global", "per_rank"] = "global"
    """Scope of the sums that losses are divided by.
    global: the whole batch, so the result does not depend on the number of workers.
    per_rank: the images of each worker, as in the original."""

    def __post_init__(self) -> None:
        check_literals(self, require, "optim.")
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "at least 1")
        require(self.epochs >= 1, "optim.epochs", self.epochs, "at least 1")
        require(self.lr > 0, "optim.lr", self.lr, "a positive learning rate")
        require(self.lr_backbone >= 0, "optim.lr_backbone", self.lr_backbone, "0 (frozen) or a positive rate")
        require(self.points_factor > 0, "optim.points_factor", self.points_factor, "a positive factor")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "a positive norm")
        require(self.decay_epoch >= 0, "optim.decay_epoch", self.decay_epoch, "0 or more")
        require(0 < self.decay_factor <= 1, "optim.decay_factor", self.decay_factor, "a factor in (0, 1]")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.max_steps >= 0, "optim.max_steps", self.max_steps, "0 (no bound) or more")
        require(0 <= self.ema < 1, "optim.ema", self.ema, "0 (off) or a decay below 1, such as 0.9997")


@dataclass(frozen=True)
class GuardConfig:
    """Handling of steps whose loss or gradient is not finite, before they change the weights."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """Reaction to a step whose loss or gradient is not finite.
    stop: end the run.
    skip: leave the update out.
    rollback: load the newest checkpoint's weights and continue."""
    max_grad_norm: float = 0.0
    """Maximum gradient norm, before clipping; a larger one counts as not finite. 0: no limit."""
    max_events: int = 3
    """Maximum number of steps that may be skipped or rolled back before the run fails."""

    def __post_init__(self) -> None:
        check_literals(self, require, "guard.")
        require(self.max_grad_norm >= 0, "guard.max_grad_norm", self.max_grad_norm, "0 (no bound) or more")
        require(self.max_events >= 1, "guard.max_events", self.max_events, "at least 1")
