"""Sections of a `RunConfig`: data, optimizer, compute, evaluation, checkpoints, cluster, guard and tracking.

Every class checks itself when it is built, so a wrong value fails on the laptop and not on 64 GPUs. The sections for
the model, its losses and its augmentation are in `detr.config`. The docstrings of the fields are the help texts of the
flags.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from detr.config import check_literals
from pipeline.errors import RunConfigError

Batching = Literal["same_size", "padded", "fixed"]
"""Rule for grouping images into evaluation batches; see `EvaluateConfig`."""
Scorer = Literal["hotcoco", "pycocotools"]
"""Library that computes the metrics of an evaluation; see `EvaluateConfig`."""


def require(holds: bool, name: str, got: object, expected: str) -> None:
    """Raise `RunConfigError` unless `holds` is true and `got` is finite."""
    # Infinity would pass a lower bound, but JSON cannot represent it.
    if not holds or got == math.inf:
        raise RunConfigError(f"{name} is {got!r}; expected {expected}")


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data, and how they are read."""

    train: str = "shards/train"
    """Folder or URL of the training data: the one that holds `manifest.json`, written by `detr shard`."""
    val: str = "shards/val"
    """Folder or URL of the validation data: the one that holds `manifest.json`, written by `detr shard`."""
    built_in: bool = False
    """Generate the built-in data set and pre-train the small backbone on it if `train` and `val` are missing.
    For the demo only."""
    built_in_stuff: bool = False
    """Generate the built-in data set in its panoptic form, with stuff behind the shapes. For the demo only."""
    reader_threads: int = 2
    """Threads per worker that read, decode and augment images.
    Raise it if MLflow's `step_share/data_wait` is not close to 0 and cores are idle."""
    sort_window: int = 1
    """Number of global batches whose images are sorted by shape together.
    1 sorts inside each batch only, so the images of a step do not change.
    A larger window pads less and is faster, but puts similar images into one step."""
    shuffle_shards: int = 0
    """Number of shards per shuffle block. 0 shuffles the whole epoch.
    Set it if the data does not fit the disk of a node."""
    epoch_tail: Literal["straddle", "short"] = "straddle"
    """Treatment of the last, incomplete batch of an epoch.
    straddle: fill it with the first images of the next epoch.
    short: take a smaller step."""
    cache: str = ""
    """Folder on each node that keeps downloaded shards. `off` reads every sample from the store.
    Empty: for remote data the folder in DETR_CACHE, or ~/.cache/detr-cluster/shards; local data is read in place."""
    cache_gib: float = 0.0
    """Maximum size of the cache folder in GiB. 0: as much as its disk has free."""
    max_bad_samples: int = 0
    """Maximum number of corrupt training images that each worker may skip, with a warning, before the run fails.
    0: the first one ends the run."""

    def __post_init__(self) -> None:
        check_literals(self, require, "data.")
        require(self.cache_gib >= 0, "data.cache_gib", self.cache_gib, "0 (no limit) or more")
        require(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more")
        require(self.reader_threads >= 1, "data.reader_threads", self.reader_threads, "at least 1")
        require(self.sort_window >= 1, "data.sort_window", self.sort_window, "at least 1 global batch")
        require(self.shuffle_shards >= 0, "data.shuffle_shards", self.shuffle_shards, "0 (the whole epoch) or more")


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
class ComputeConfig:
    """Speed and memory of the computation. The defaults compute in fp32, as the paper does."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network.
    fp32: as in the paper.
    bf16: autocast, faster on recent GPUs; boxes, costs, losses, weights and optimizer stay in fp32."""
    tf32: Literal["auto", "yes", "no"] = "auto"
    """Rounding of the factors of fp32 products to TF32, 10 bits, on GPUs that have it (from A100 on).
    auto: convolutions only, as torch does by itself.
    yes: matrix products as well, which is several times as fast.
    no: neither, so that fp32 means fp32."""
    deterministic: bool = False
    """Add up in the same order in each run, so that a resumed run repeats bit for bit on the same kind of GPU.
    Slower, and with more memory; an operation without such a kernel ends the run. CPUs do so in any case."""
    channels_last: bool = True
    """Store images and convolution weights in channels-last layout: usually faster, the same results up to rounding."""
    compile: bool = False
    """Compile the network with torch.compile.
    It is compiled once per canvas shape: raise `canvas_multiple` so that there are few shapes."""
    canvas_multiple: int = 1
    """Pad each batch up to a multiple of this many pixels in height and width. 1: only up to the largest image.
    Set it, such as to 64, if you compile; padding changes predictions slightly."""
    max_microbatch: int = 0
    """Maximum number of images per worker in one forward pass. 0: no limit.
    Lower it if a GPU runs out of memory: larger batches are split, and the gradients are added up."""
    recompute: Literal["none", "encoder", "backbone", "both"] = "none"
    """Modules whose activations are recomputed in the backward pass instead of stored.
    Set it if a GPU runs out of memory; a step then takes longer."""
    graphs: bool = False
    """Replay the network's forward and backward pass as CUDA graphs, one launch each instead of thousands.
    The most frequent canvases are captured; set `canvas_multiple` to 64, so that there are few. Needs GPUs and memory
    for a second pass. With ddp, gradients are averaged after the backward pass, not beside it.
    If memory runs short, a resumed run may capture other canvases, so with `deterministic` it repeats only up to rounding."""
    max_graphs: int = 64
    """Maximum number of canvases that are captured with `graphs`; passes over others run as without it."""

    def __post_init__(self) -> None:
        check_literals(self, require, "compute.")
        require(self.max_graphs >= 1, "compute.max_graphs", self.max_graphs, "at least 1, or no graphs")
        require(self.max_microbatch >= 0, "compute.max_microbatch", self.max_microbatch, "0 (no bound) or more")
        require(self.canvas_multiple >= 1, "compute.canvas_multiple", self.canvas_multiple, "at least 1 pixel")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during a run, on the validation data; each image counts once."""

    every: int = 1
    """Number of epochs between evaluations. The last step is always evaluated."""
    batch_size: int = 2
    """Maximum number of images per forward pass in evaluation. The scores do not depend on the number of workers."""
    batching: Batching = "same_size"
    """Rule for images that share an evaluation batch.
    same_size: only images of the same size, so nothing is padded and scores do not depend on `batch_size`.
    padded: images of similar shape, padded to the largest, as in the original; changes scores slightly.
    fixed: pad all images to one square."""
    asynchronous: bool = False
    """Evaluate checkpoints in the background while training continues, on CPUs or a GPU that no worker uses."""
    limit: int = 0
    """Maximum number of validation images, for a smoke test only. 0: all of them."""
    pictures: int = 4
    """Number of validation images that are logged at each evaluation with detections next to the ground truth."""
    explain: bool = True
    """Log the reasons of each score as well: kinds of errors, calibration, worst images, suspect labels.
    It takes two seconds for 5,000 images, in a thread of rank 0 while training continues."""
    scorer: Scorer = "hotcoco"
    """Library that computes the metrics; both give the same numbers.
    hotcoco: a second for 5,000 images.
    pycocotools: the reference; a minute for 5,000 images, while all workers wait."""

    def __post_init__(self) -> None:
        check_literals(self, require, "evaluate.")
        require(self.limit >= 0, "evaluate.limit", self.limit, "0 (all) or more")
        require(self.every >= 1, "evaluate.every", self.every, "at least 1 epoch")
        require(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "at least 1")
        require(self.pictures >= 0, "evaluate.pictures", self.pictures, "0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """Interval, storage and retention of checkpoints. The newest and the best are always kept."""

    every_steps: int = 500
    """Number of steps between checkpoints. 0: save only before evaluations and at the end.
    A failure costs the steps since the last checkpoint."""
    every_minutes: float = 0.0
    """Maximum number of minutes between checkpoints, in addition to `every_steps`. 0: no time limit."""
    keep: int = 2
    """Number of newest checkpoints to keep, in addition to the best."""
    keep_every_epochs: int = 0
    """Number of epochs between checkpoints that are never deleted. 0: none."""
    store: str = ""
    """Folder or URL for checkpoints (s3://bucket/runs, or any other that fsspec opens); each run gets a folder in it.
    Empty: the folder of the run."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "0 or more")
        require(self.every_minutes >= 0, "checkpoint.every_minutes", self.every_minutes, "0 (no clock) or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        require(self.keep_every_epochs >= 0, "checkpoint.keep_every_epochs", self.keep_every_epochs, "0 (none) or more")


@dataclass(frozen=True)
class ClusterConfig:
    """Number of Ray Train workers and their resources.

    The number of workers changes only the random numbers of dropout and the padding of images, as long as
    `optim.normalise` is global.
    """

    workers: int = 1
    """Number of worker processes, usually one per GPU. The global batch is divided among them."""
    min_workers: int = 0
    """Minimum number of workers with which the run may continue while nodes are missing.
    0: always exactly `workers`."""
    strategy: Literal["single", "ddp", "fsdp", "hsdp"] = "ddp"
    """Distribution of the model over workers.
    single: one worker.
    ddp: each worker holds the whole model.
    fsdp: workers split weights, gradients and optimizer state, for less memory per GPU.
    hsdp: the workers of each node split them, and nodes exchange only averages of gradients; on one node it is fsdp.
    Losses and checkpoints are the same."""
    gpu: Literal["auto", "yes", "no"] = "auto"
    """Use of GPUs.
    auto: one per worker if the cluster has any.
    yes: one per worker; refuse a cluster without GPUs.
    no: train on CPUs."""
    cpus_per_worker: int = 1
    """Number of CPU cores to reserve for each worker. Give each worker at least as many as `data.reader_threads`."""
    max_failures: int = 3
    """Maximum number of restarts after failures before the run ends; each resumes from the last checkpoint.
    -1: no limit. Announced node removals and changes of the number of workers do not count."""
    collective_timeout_s: int = 600
    """Seconds a collective may take before the workers are restarted.
    Allow for the slowest step, evaluation, first compilation and store retries."""
    wait_s: int = 900
    """Seconds to wait until the cluster at `--address` answers and has the nodes, GPUs and CPUs that the workers need.
    After them the command ends with status 75; nothing is created before."""

    def __post_init__(self) -> None:
        check_literals(self, require, "cluster.")
        require(self.workers >= 1, "cluster.workers", self.workers, "at least 1")
        alone = self.workers == 1 or self.strategy != "single"
        require(alone, "cluster.workers", self.workers, "1 with cluster.strategy 'single': choose ddp or fsdp for more")
        require(self.cpus_per_worker >= 1, "cluster.cpus_per_worker", self.cpus_per_worker, "at least 1")
        fits = 0 <= self.min_workers <= self.workers
        require(fits, "cluster.min_workers", self.min_workers, "0 (a fixed number) to cluster.workers")
        require(self.max_failures >= -1, "cluster.max_failures", self.max_failures, "0 or more, or -1 (no bound)")
        timeout = self.collective_timeout_s
        require(timeout >= 1, "cluster.collective_timeout_s", timeout, "at least 1 second")
        require(self.wait_s >= 0, "cluster.wait_s", self.wait_s, "0 (no wait) or more")

    @property
    def fewest(self) -> int:
        """Minimum number of workers that the run continues with."""
        return self.min_workers or self.workers


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


@dataclass(frozen=True)
class TrackConfig:
    """Names in MLflow and its model registry, and how often curves get a point."""

    experiment: str = "detr"
    """MLflow experiment of the run."""
    run_name: str = ""
    """Name of the run in MLflow and of its folder. Empty: the name of the recipe."""
    register_as: str = ""
    """Registered model that gets the best checkpoint as a new version.
    Empty: the name of the recipe, with `detr-` in front."""
    register: Literal["best", "never", "always"] = "best"
    """Registration of the best checkpoint when the run ends.
    best: as a new version; `@best` moves to it unless it is on one with a higher AP on the same data.
    always: as a new version, and `@best` moves to it whatever its AP.
    never: no version. `detr register RUN --name NAME` makes one later."""
    log_every: int = 50
    """Number of steps between points of the training curves."""
    system_every_s: float = 10.0
    """Seconds between points of the system metrics: load of CPU, memory, disk, network and GPUs of each node. 0: none."""
    wait_s: float = 600.0
    """Seconds that a trained run waits for an MLflow that does not answer, before the registration is left to the next
    command. Training itself never waits for MLflow."""

    def __post_init__(self) -> None:
        check_literals(self, require, "track.")
        require(self.system_every_s >= 0, "track.system_every_s", self.system_every_s, "a number of seconds, or 0")
        require(self.wait_s >= 0, "track.wait_s", self.wait_s, "a number of seconds, or 0")
        require(bool(self.experiment), "track.experiment", self.experiment, "a name")
        # The registry would refuse them too, but only at the end of the run.
        nameable = not set(self.register_as) & set("/:")
        require(nameable, "track.register_as", self.register_as, "a name without / and :")
        require(self.log_every >= 1, "track.log_every", self.log_every, "at least 1 step")
