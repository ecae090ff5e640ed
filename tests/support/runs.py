"""Runs in the test's process on the tiny data set: start, kill and watch them, read what they wrote."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.batch import Batch
from detr.model import build_model
from pipeline import run_folder
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Location
from pipeline.config import RunConfig
from pipeline.training import loop
from pipeline.training.model import save_initial
from pipeline.training.state import RunInfo
from pipeline.training.step import StepResult, train_step
from tests.support.tracker import MemoryTracker


class Kill(BaseException):
    """A kill: nothing in the loop may catch it."""


class KillingTracker(MemoryTracker):
    """Tracker that raises `Kill` when a metric of `family` is reported at `step` or later."""

    def __init__(self, family: str, step: int) -> None:
        super().__init__()
        self._family, self._step = family, step

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if step >= self._step and any(name.split("/")[0] == self._family for name in values):
            raise Kill
        super().metrics(values, step)


def start(config: RunConfig, folder: Location) -> RunInfo:
    """Write the initial weights of a run to its location."""
    torch.manual_seed(config.seed)
    save_initial(build_model(config.model, 4), folder)
    return RunInfo("run", folder, "commit")


def weights(config: RunConfig, folder: Location) -> dict[str, torch.Tensor]:
    """Return the weights of the newest checkpoint."""
    model = build_model(config.model, 4)
    path = catalog.newest(folder)
    assert path is not None
    checkpoint_state.load_weights(path, model)
    return model.state_dict()


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def evaluated(folder: Path) -> list[str]:
    """Return the last two digits of the steps of evaluated checkpoints."""
    return [path.name[-2:] for path in catalog.list_checkpoints(folder) if catalog.read_evaluation(path) is not None]


def shown_images(patch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Return a dictionary that runs fill with the image ids of each step."""
    seen: dict[int, list[int]] = {}

    def step(model: Any, batches: Sequence[Batch], optimizer: Any, config: Any, ranks: Any, *more: Any) -> StepResult:
        seen[more[0]] = [target.image_id for batch in batches for target in batch.targets]
        return train_step(model, batches, optimizer, config, ranks, *more)

    patch.setattr(loop, "train_step", step)
    return seen


def run_folder_table() -> list[list[str]]:
    """Return the rows of the table in `pipeline.run_folder`: name, writer and reader."""
    lines = [line.strip() for line in (run_folder.__doc__ or "").splitlines() if line.startswith("    ")]
    return [re.split(r"\s{2,}", line) for line in lines[1:]]
