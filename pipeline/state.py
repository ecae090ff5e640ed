"""What a worker trains: its unchanging surroundings, and the one thing that changes."""

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
    """Which run this is: its id, its folder (seen by every worker) and the commit of the code."""

    run_id: str
    folder: Path
    code_commit: str
    accept_change: bool = False
    """Go on from a checkpoint of another stream of samples; see `pipeline/identity.py`."""


@dataclass
class State:
    """The one mutable thing: model, optimizer, and how many optimizer steps they have taken."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    ema: Ema | None = None
    """Averages of the weights, where the run makes them."""

    @property
    def averages(self) -> dict[str, Tensor] | None:
        """The averages by parameter name."""
        return None if self.ema is None else self.ema.averages


@dataclass(frozen=True)
class Worker:
    """A worker's unchanging surroundings."""

    config: RunConfig
    place: Place
    ranks: Ranks
    tracker: Tracker | None
    """Only on rank 0."""
    train: Manifest
    val: Manifest
    schedule: Schedule

    @property
    def home(self) -> Location:
        """What holds the run's checkpoints."""
        return home_of(self.config.checkpoint.store, self.place.folder)
