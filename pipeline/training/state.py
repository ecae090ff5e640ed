"""State of a worker: the constant context of its run, and the model and optimizer that training changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.checkpoint.location import Location, checkpoint_root
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from pipeline.tracking.tracker import Tracker
from pipeline.training.ema import Ema
from pipeline.training.graphs.passes import Graphs
from shards.dataset.manifest import Manifest


@dataclass(frozen=True)
class RunInfo:
    """Identity of the run for its workers."""

    run_id: str
    folder: Location
    """Location of the run, in storage that every worker sees."""
    code_commit: str
    accept_change: bool = False
    """Continue from a checkpoint of another stream of samples; see `continuation`."""


@dataclass
class TrainState:
    """Mutable state of the training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    """Number of optimizer steps taken."""
    ema: Ema | None = None
    """Moving averages of the weights; None if `optim.ema` is 0."""
    graphs: Graphs | None = None
    """CUDA graphs of the passes; None if `compute.graphs` is off."""

    @property
    def averages(self) -> dict[str, Tensor] | None:
        """Moving averages by parameter name, or None."""
        return None if self.ema is None else self.ema.averages


@dataclass(frozen=True)
class WorkerContext:
    """Constant context of a worker."""

    config: RunConfig
    run_info: RunInfo
    ranks: Ranks
    tracker: Tracker | None
    """None on all ranks but rank 0."""
    train: Manifest
    val: Manifest
    schedule: Schedule

    @property
    def root(self) -> Location:
        """Location of the run's checkpoints."""
        return checkpoint_root(self.config.checkpoint.store, self.run_info.folder)
