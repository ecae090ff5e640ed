"""Sections of the computation and of the workers that share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detr.config import check_literals
from pipeline.config.checks import require


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
