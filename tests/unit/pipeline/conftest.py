"""Runs in the test's process on the tiny data set: one that is new, and one that ended, to compare with."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from tests.support.runs import start


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return replace(tiny_config, checkpoint=replace(tiny_config.checkpoint, every_steps=2, keep=9))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the uninterrupted run, which the first test that needs it makes; tests must not write into it."""
    return tmp_path_factory.mktemp("finished") / "run"


@pytest.fixture
def uninterrupted(config: RunConfig, finished: Path) -> Path:
    if not finished.exists():
        run(config, start(config, finished), Ranks(), None)
    return finished


@pytest.fixture
def run_info(config: RunConfig, tmp_path: Path) -> RunInfo:
    return start(config, tmp_path / "run")
