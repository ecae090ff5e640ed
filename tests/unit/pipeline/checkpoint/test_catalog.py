"""A run that has saved must not start again silently."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint import catalog
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from pipeline.training.loop import run
from tests.support.runs import Kill, KillingTracker, start
from tests.support.tracker import MemoryTracker


def stored(config: RunConfig, store: Path) -> RunConfig:
    return replace(config, checkpoint=replace(config.checkpoint, every_steps=2, store=str(store)))


def losses(tracker: MemoryTracker) -> list[int]:
    return [step for name, _, step in tracker.points if name == "train/loss"]


def test_workers_without_the_store_refuse_to_start_again(tiny_config: RunConfig, tmp_path: Path) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    config, run_info = stored(tiny_config, store), start(tiny_config, tmp_path / "tiny-1")
    with pytest.raises(Kill):
        run(config, run_info, Ranks(), KillingTracker("train", 4))
    store.rename(away)
    tracker = MemoryTracker()
    with pytest.raises(
        CheckpointError, match=r"store/tiny-1 .* has saved step 3 there: is its storage mounted"
    ) as caught:
        run(config, run_info, Ranks(), tracker)
    assert "\n" not in str(caught.value)
    assert tracker.points == []
    assert not store.exists()
    away.rename(store)
    run(config, run_info, Ranks(), tracker)
    assert losses(tracker) == [4, 5, 6]
    assert catalog.newest_of_run(store / "tiny-1", run_info.folder) == catalog.folder_of(store / "tiny-1", 6)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny_config: RunConfig, tmp_path: Path) -> None:
    config, run_info = stored(tiny_config, tmp_path / "store"), start(tiny_config, tmp_path / "tiny-1")
    with pytest.raises(Kill):
        run(config, run_info, Ranks(), KillingTracker("train", 2))
    tracker = MemoryTracker()
    run(config, run_info, Ranks(), tracker)
    assert losses(tracker) == [1, 2, 3, 4, 5, 6]
