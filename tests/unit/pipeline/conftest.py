"""Runs in this process on the tiny data set: begun, killed, watched, and one that ended for others to compare with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from detr.batch import Batch
from detr.model import build_model
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.tracking.tracker import MemoryTracker
from pipeline.training import loop as module
from pipeline.training.loop import run
from pipeline.training.model import save_initial
from pipeline.training.state import RunInfo
from pipeline.training.step import StepResult, train_step


class Kill(BaseException):
    """Stands for a kill: nothing in the loop may catch it."""


class KillingTracker(MemoryTracker):
    """Dies when a point of the family is told at or after the step."""

    def __init__(self, family: str, step: int) -> None:
        super().__init__()
        self._family, self._step = family, step

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        if step >= self._step and any(name.split("/")[0] == self._family for name in values):
            raise Kill
        super().metrics(values, step)


def start(config: RunConfig, folder: Path) -> RunInfo:
    torch.manual_seed(config.seed)
    save_initial(build_model(config.model, 4), folder)
    return RunInfo("run", folder, "commit")


def weights(config: RunConfig, folder: Path) -> dict[str, torch.Tensor]:
    model = build_model(config.model, 4)
    path = catalog.newest(folder)
    assert path is not None
    checkpoint_state.load_weights(path, model)
    return model.state_dict()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def evaluated(folder: Path) -> list[str]:
    return [path.name[-2:] for path in catalog.list_checkpoints(folder) if catalog.read_evaluation(path) is not None]


def shown_images(patch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Filled, while runs run, with the image ids of each step."""
    seen: dict[int, list[int]] = {}

    def step(model: Any, batches: Sequence[Batch], optimizer: Any, config: Any, ranks: Any, *more: Any) -> StepResult:
        seen[more[0]] = [target.image_id for batch in batches for target in batch.targets]
        return train_step(model, batches, optimizer, config, ranks, *more)

    patch.setattr(module, "train_step", step)
    return seen


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return replace(tiny_config, checkpoint=replace(tiny_config.checkpoint, every_steps=2, keep=9))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves an uninterrupted run, for the others to compare with; they must not write into it."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def uninterrupted(config: RunConfig, finished: Path) -> Path:
    if not finished.exists():
        run(config, start(config, finished), Ranks(), None)
    return finished


@pytest.fixture
def place(config: RunConfig, tmp_path: Path) -> RunInfo:
    return start(config, tmp_path / "run")
