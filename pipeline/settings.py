"""The parts of a `RunConfig` that `pipeline` defines, one class for each thing a person decides about.

Every class checks itself when it is built, so that a wrong number fails on the laptop and not on 64 GPUs. Those of the
model, its losses and its augmentation are in `detr.config`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from pipeline.errors import RunConfigError

Batching = Literal["same_size", "padded", "fixed"]
"""Which images an evaluation puts into one batch; see `EvaluateConfig`."""


def require(holds: bool, name: str, got: object, expected: str) -> None:
    # Infinity would pass a bound and be lost in JSON, which has no word for it.
    if not holds or got == math.inf:
        raise RunConfigError(f"{name} is {got!r}; expected {expected}")


@dataclass(frozen=True)
class DataConfig:
    """Where the shards are (folders or URLs that hold a `manifest.json`) and how they are read."""

    train: str = "shards/train"
    val: str = "shards/val"
    built_in: bool = False
    """Generate the built-in data set, and pre-train the small backbone on it, where `train` and `val` are absent."""
    reader_threads: int = 2
    """Threads per worker that read, decode and resize; each releases the GIL while it does."""
    sort_window: int = 1
    """Global batches whose images are sorted by shape together. 1: inside each, so which images a step sees does not
    change; more: less padding and steps of like images, but other batches."""
    shuffle_shards: int = 0
    """Shuffle in blocks of so many shards, for data that does not fit a node's disk; 0: over the whole epoch."""
    epoch_tail: Literal["straddle", "short"] = "straddle"
    """straddle: the step in which an epoch ends begins the next. short: it holds what is left of the epoch."""
    cache: str = ""
    """Folder on each node that keeps what was fetched, each shard once; `off` asks the store for every sample. Empty: for
    remote data the folder that DETR_CACHE names, or ~/.cache/detr-cluster/shards; local data is read where it lies."""
    cache_gib: float = 0.0
    """At most so many GiB in that folder; 0 for as much as its disk has room for."""
    max_bad_samples: int = 0
    """So many training images whose bytes are bad are left out by each worker, with a warning; one more ends the run."""

    def __post_init__(self) -> None:
        require(self.cache_gib >= 0, "data.cache_gib", self.cache_gib, "0 (no limit) or more")
        require(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more")
        require(self.reader_threads >= 1, "data.reader_threads", self.reader_threads, "at least 1")
        require(self.sort_window >= 1, "data.sort_window", self.sort_window, "at least 1 global batch")
        require(self.shuffle_shards >= 0, "data.shuffle_shards", self.shuffle_shards, "0 (the whole epoch) or more")
        require(self.epoch_tail in ("straddle", "short"), "data.epoch_tail", self.epoch_tail, "straddle or short")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with two learning rates, clipping and a schedule (paper, appendix A.4)."""

    batch_size: int = 64
    """Images per optimizer step over all workers together."""
    epochs: int = 300
    lr: float = 1e-4
    lr_backbone: float = 1e-5
    """0 freezes the backbone."""
    weight_decay: float = 1e-4
    clip_norm: float = 0.1
    """Largest total norm of the gradient."""
    decay: Literal["step", "linear"] = "step"
    """step: both rates times `decay_factor` from `decay_epoch` on. linear: from there down to it at the last step."""
    decay_epoch: int = 200
    decay_factor: float = 0.1
    warmup_epochs: float = 0.0
    max_steps: int = 0
    """Stop after so many steps, whatever `epochs` says; 0 for no such bound."""
    ema: float = 0.0
    """Evaluate and register an average of the weights that keeps this much of itself at each step, such as 0.9997; 0: the
    weights themselves, as in the paper."""
    train: Literal["all", "mask_head"] = "all"
    """mask_head: only the mask head learns, on top of the detector that `initial` names (paper, section 4.4)."""
    normalise: Literal["global", "per_rank"] = "global"
    """What losses are divided by: the global batch's sums, or, as in the original, each worker's own, by which the result
    depends on the number of workers; see `pipeline/step.py`."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "at least 1")
        require(self.epochs >= 1, "optim.epochs", self.epochs, "at least 1")
        require(self.lr > 0, "optim.lr", self.lr, "a positive learning rate")
        require(self.lr_backbone >= 0, "optim.lr_backbone", self.lr_backbone, "0 (frozen) or a positive rate")
        require(self.weight_decay >= 0, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.clip_norm > 0, "optim.clip_norm", self.clip_norm, "a positive norm")
        require(self.decay_epoch >= 0, "optim.decay_epoch", self.decay_epoch, "0 or more")
        require(0 < self.decay_factor <= 1, "optim.decay_factor", self.decay_factor, "a factor in (0, 1]")
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", self.warmup_epochs, "0 or more")
        require(self.max_steps >= 0, "optim.max_steps", self.max_steps, "0 (no bound) or more")
        require(0 <= self.ema < 1, "optim.ema", self.ema, "0 (off) or a decay below 1, such as 0.9997")
        require(self.train in ("all", "mask_head"), "optim.train", self.train, "all or mask_head")
        require(self.normalise in ("global", "per_rank"), "optim.normalise", self.normalise, "global or per_rank")


@dataclass(frozen=True)
class ComputeConfig:
    """How the arithmetic is done: speed and memory, not the experiment. The defaults are the paper's fp32."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: the network under autocast; costs, boxes, losses, weights and optimizer stay fp32."""
    channels_last: bool = True
    """Lay images and the backbone's convolutions out as [B, H, W, C]: the same sums, faster kernels."""
    compile: bool = False
    """Compile the network, once per canvas shape: round canvases with `canvas_multiple` so that there are few."""
    canvas_multiple: int = 1
    """Pad a batch's canvas up to a multiple of so many pixels each way; 1: to the largest image only. Padding changes
    answers slightly."""
    max_microbatch: int = 0
    """Most images of a worker in one forward pass; 0 for no bound. A larger part of the batch is cut into so many
    passes whose gradients add up."""
    recompute: Literal["none", "encoder", "backbone", "both"] = "none"
    """Activation checkpointing: forget what the backward pass needs of these parts, and compute it again there."""

    def __post_init__(self) -> None:
        require(self.precision in ("fp32", "bf16"), "compute.precision", self.precision, "fp32 or bf16")
        parts = ("none", "encoder", "backbone", "both")
        require(self.recompute in parts, "compute.recompute", self.recompute, f"one of {', '.join(parts)}")
        require(self.max_microbatch >= 0, "compute.max_microbatch", self.max_microbatch, "0 (no bound) or more")
        require(self.canvas_multiple >= 1, "compute.canvas_multiple", self.canvas_multiple, "at least 1 pixel")


@dataclass(frozen=True)
class EvaluateConfig:
    """The evaluation inside a run: the whole validation set, each image once."""

    every: int = 1
    """Epochs between evaluations; the last step is always evaluated."""
    batch_size: int = 2
    """Most images per forward. Batches are fixed by the plan, so the figures do not depend on the number of workers."""
    batching: Batching = "same_size"
    """same_size: only images of one size share a batch, so nothing is padded and the figures are those of batch 1 whatever
    `batch_size` says. padded: images of like shape do, padded to the largest, as the original evaluates; padding changes
    a DETR's answer slightly. fixed: every image is padded to one square."""
    asynchronous: bool = False
    """Training does not wait: its checkpoints are evaluated beside it, on CPUs or a GPU of the cluster that no worker has."""
    limit: int = 0
    """Score only so many images, for a smoke test; 0 for all. Such figures are no result."""
    pictures: int = 4
    """Validation images drawn with detections next to the truth at each evaluation."""

    def __post_init__(self) -> None:
        require(self.limit >= 0, "evaluate.limit", self.limit, "0 (all) or more")
        require(self.every >= 1, "evaluate.every", self.every, "at least 1 epoch")
        require(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "at least 1")
        require(self.batching in get_args(Batching), "evaluate.batching", self.batching, "same_size, padded or fixed")
        require(self.pictures >= 0, "evaluate.pictures", self.pictures, "0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, where, and what stays. The newest and the best are always kept."""

    every_steps: int = 500
    """Steps between saves inside an epoch; 0 saves at the ends of epochs only."""
    every_minutes: float = 0.0
    """Save as well when the last save began so many minutes ago; 0 for no such clock."""
    keep: int = 2
    """How many of the newest to keep, besides the best."""
    keep_every_epochs: int = 0
    """Keep the checkpoint at the end of every so many epochs for good; 0 for none."""
    store: str = ""
    """Folder or URL that takes the checkpoints of runs (s3://bucket/runs, or any other that fsspec opens), each below the
    name of its run's folder. Empty: the run's folder itself."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "0 or more")
        require(self.every_minutes >= 0, "checkpoint.every_minutes", self.every_minutes, "0 (no clock) or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        require(self.keep_every_epochs >= 0, "checkpoint.keep_every_epochs", self.keep_every_epochs, "0 (none) or more")


@dataclass(frozen=True)
class ClusterConfig:
    """How many Ray Train workers, and with what. Their number changes dropout's draws and the canvases that images are
    padded to; with `optim.normalise global`, nothing else of what is learned."""

    workers: int = 1
    min_workers: int = 0
    """At least so many, where the run may go on with fewer while nodes are away; 0: always `workers`."""
    strategy: Literal["single", "ddp", "fsdp"] = "ddp"
    """single: one worker. ddp: each worker holds the whole model. fsdp: they divide weights, gradients and optimizer state
    among themselves. Losses and checkpoints are the same."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """auto: one GPU per worker where the cluster has any."""
    cpus_per_worker: int = 1
    max_failures: int = 3
    """How often a failed worker group is restarted from the last checkpoint before the run gives up; -1: always. Nodes that
    are taken away with notice, and changes of the number of workers, do not count."""
    collective_timeout_s: int = 600
    """So long a worker waits for the others before the group is restarted: for the slowest step, evaluation or first
    compilation, and what a store's patience allows."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, "cluster.workers", self.workers, "at least 1")
        require(self.strategy in ("single", "ddp", "fsdp"), "cluster.strategy", self.strategy, "single, ddp or fsdp")
        alone = self.workers == 1 or self.strategy != "single"
        require(alone, "cluster.workers", self.workers, "1 with cluster.strategy 'single': choose ddp or fsdp for more")
        require(self.cpus_per_worker >= 1, "cluster.cpus_per_worker", self.cpus_per_worker, "at least 1")
        fits = 0 <= self.min_workers <= self.workers
        require(fits, "cluster.min_workers", self.min_workers, "0 (a fixed number) to cluster.workers")
        require(self.max_failures >= -1, "cluster.max_failures", self.max_failures, "0 or more, or -1 (no bound)")
        timeout = self.collective_timeout_s
        require(timeout >= 1, "cluster.collective_timeout_s", timeout, "at least 1 second")

    @property
    def fewest(self) -> int:
        """The least number of workers that the run goes on with."""
        return self.min_workers or self.workers


@dataclass(frozen=True)
class GuardConfig:
    """What happens before an update that would spoil the weights; see `pipeline/guard.py`."""

    policy: Literal["stop", "skip", "rollback"] = "stop"
    """stop: end the run. skip: leave the update out. rollback: take the newest checkpoint's weights and go on."""
    max_grad_norm: float = 0.0
    """A total norm above it counts as not finite does; 0 for no bound. Clipping (`optim.clip_norm`) comes after."""
    max_events: int = 3
    """So many are skipped or rolled back in a run; one more ends it."""

    def __post_init__(self) -> None:
        require(self.policy in ("stop", "skip", "rollback"), "guard.policy", self.policy, "stop, skip or rollback")
        require(self.max_grad_norm >= 0, "guard.max_grad_norm", self.max_grad_norm, "0 (no bound) or more")
        require(self.max_events >= 1, "guard.max_events", self.max_events, "at least 1")


@dataclass(frozen=True)
class TrackConfig:
    """What MLflow shows of the run."""

    experiment: str = "detr"
    run_name: str = ""
    """Empty: the recipe's name."""
    register_as: str = ""
    """Registered model that the best checkpoint becomes a version of; empty: `detr-` and the recipe's name."""
    log_every: int = 50
    """Steps between points of the training curves."""

    def __post_init__(self) -> None:
        require(bool(self.experiment), "track.experiment", self.experiment, "a name")
        # The registry refuses them, but only when the run has ended.
        nameable = not set(self.register_as) & set("/:")
        require(nameable, "track.register_as", self.register_as, "a name without / and :")
        require(self.log_every >= 1, "track.log_every", self.log_every, "at least 1 step")
