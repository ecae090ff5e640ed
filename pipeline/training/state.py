"""State of a worker: the constant context of its run, and the model and optimizer that training changes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pipeline.checkpoint_store import Location, home_of
from pipeline.config import RunConfig
from pipeline.ema import Ema
from pipeline.optim import Schedule
from pipeline.parallel import Ranks
from pipeline.track import Tracker
from shards.manifest import Manifest


@dataclass(frozen=True)
class Place:
    """Identity of the run for its workers."""

    run_id: str
    folder: Path
    """Folder of the run, on storage that every worker sees."""
    code_commit: str
    accept_change: bool = False
    """Continue from a checkpoint of another stream of samples; see `continuation`."""


@dataclass
class State:
    """Mutable state of the training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    """Number of optimizer steps taken."""
    ema: Ema | None = None
    """Moving averages of the weights; None if `optim.ema` is 0."""

    @property
    def averages(self) -> dict[str, Tensor] | None:
        """Moving averages by parameter name, or None."""
        return None if self.ema is None else self.ema.averages


@dataclass(frozen=True)
class Worker:
    """Constant context of a worker."""

    config: RunConfig
    place: Place
    ranks: Ranks
    tracker: Tracker | None
    """None on all ranks but rank 0."""
    train: Manifest
    val: Manifest
    schedule: Schedule

    @property
    def home(self) -> Location:
        """Location of the run's checkpoints."""
        return home_of(self.config.checkpoint.store, self.place.folder)
