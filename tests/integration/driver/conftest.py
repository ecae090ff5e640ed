"""The driver around the workers, without Ray: a real store and folder, and workers in this process."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.train import Launch
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from tests.support.workers import stand_in


@pytest.fixture
def launch() -> Launch:
    return Launch(say=lambda text: None)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], None]:
    """Choose how the workers end: trained in this process, or with an error."""

    def choose(error: BaseException | None) -> None:
        def run_workers(config: RunConfig, run_id: str, folder: Path, *, accept_change: bool = False) -> None:
            if error is not None:
                raise error
            run(config, RunInfo(run_id, folder, "commit", accept_change), Ranks(), None)

        stand_in(monkeypatch, run_workers)

    return choose


@pytest.fixture
def named(short_config: RunConfig, tmp_path: Path) -> RunConfig:
    return replace(short_config, storage=str(tmp_path / "runs"))
