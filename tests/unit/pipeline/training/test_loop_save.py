"""Saves on request: their steps, the checkpoints that are kept, and results that a save does not change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.metadata import read_meta
from pipeline.checkpoint.saver import Saver
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from pipeline.training.loop import run
from pipeline.training.requests import NO_REQUEST, LoopHooks, Request
from pipeline.training.state import RunInfo
from tests.support.runs import Kill, KillingTracker, assert_same, shown_images, start, weights
from tests.support.tracker import MemoryTracker


def saved_by_the_clock(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make a save due on rank 0 while these steps are taken, counted from 1."""
    seen = shown_images(monkeypatch)
    monkeypatch.setattr(Saver, "due", lambda _: len(seen) + 1 in steps)


def test_a_save_by_the_clock_changes_neither_result_nor_curves(
    config: RunConfig, run_info: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        config,
        checkpoint=replace(config.checkpoint, every_steps=0),
        track=replace(config.track, log_every=3),
    )
    plain, clocked = MemoryTracker(), MemoryTracker()
    run(config, run_info, Ranks(), plain)
    other = start(config, tmp_path / "clocked")
    saved_by_the_clock(monkeypatch, 1, 2, 4, 6)
    written, write = [], checkpoint_state.write
    monkeypatch.setattr(checkpoint_state, "write", lambda *more: (written.append(more[2].step), write(*more))[1])
    run(config, other, Ranks(), clocked)
    assert written == [1, 2, 3, 4, 6]  # the last one is due in any case
    assert [path.name[-1] for path in catalog.list_checkpoints(other.folder)] == ["1", "2", "3", "4", "6"]
    assert_same(weights(config, other.folder), weights(config, run_info.folder))

    def curves(tracker: MemoryTracker) -> list[Any]:
        measured = ("speed", "step", "step_share", "evaluation", "pause")
        points = [point for point in tracker.points if point[0].split("/")[0] not in measured]
        return sorted(points, key=lambda point: (point[0], point[2]))  # a thread explains evaluations meanwhile

    assert curves(clocked) == curves(plain) != []


def test_a_run_continues_from_a_save_by_the_clock(
    config: RunConfig, run_info: RunInfo, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=0))
    saved_by_the_clock(monkeypatch, 5)
    with pytest.raises(Kill):
        run(config, run_info, Ranks(), KillingTracker("train", 6))
    assert catalog.newest(run_info.folder) == catalog.folder_of(run_info.folder, 5)
    run(config, run_info, Ranks(), None)
    assert_same(weights(config, run_info.folder), weights(config, uninterrupted))


def test_a_checkpoint_that_cannot_be_written_ends_the_run_early(
    config: RunConfig, run_info: RunInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise CheckpointError("no room")

    config = replace(
        config,
        optim=replace(config.optim, epochs=20),
        checkpoint=replace(config.checkpoint, every_steps=0),
        evaluate=replace(config.evaluate, every=20),
    )
    due = Saver.due
    saved_by_the_clock(monkeypatch, 1)
    due_at_first = Saver.due
    monkeypatch.setattr(Saver, "due", lambda saver: due_at_first(saver) or due(saver))
    monkeypatch.setattr(checkpoint_state, "write", full)
    tracker = MemoryTracker()
    with pytest.raises(CheckpointError, match="no room"):
        run(config, run_info, Ranks(), tracker)
    assert max(step for name, _, step in tracker.points if name == "train/loss") < 30


def test_milestones_are_saved_and_stay(config: RunConfig, run_info: RunInfo) -> None:
    tight = replace(
        config,
        optim=replace(config.optim, epochs=4),
        evaluate=replace(config.evaluate, every=3),
        checkpoint=replace(config.checkpoint, every_steps=0, keep=1, keep_every_epochs=2),
    )
    run(tight, run_info, Ranks(), None)
    best = catalog.best(run_info.folder)
    assert best is not None
    left = {path.name[-2:]: read_meta(path).milestone for path in catalog.list_checkpoints(run_info.folder)}
    assert left == {best[0].name[-2:]: False} | {"06": True, "12": True}


def test_old_checkpoints_go_and_the_best_stays(config: RunConfig, run_info: RunInfo) -> None:
    tight = replace(config, checkpoint=replace(config.checkpoint, every_steps=1, keep=1))
    run(tight, run_info, Ranks(), None)
    names = [path.name[-1] for path in catalog.list_checkpoints(run_info.folder)]
    best = catalog.best(run_info.folder)
    assert best is not None
    assert set(names) == {"6", best[0].name[-1]}


def test_a_requested_stop_saves_after_the_step_and_is_resumed_there(
    config: RunConfig, run_info: RunInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config, run_info, Ranks(), None)
    stopped = start(config, tmp_path / "stopped")
    seen = shown_images(monkeypatch)
    # While the second step is taken.
    run(config, stopped, Ranks(), None, LoopHooks(lambda: Request(stop=len(seen) == 1)))
    assert catalog.newest(stopped.folder) == catalog.folder_of(stopped.folder, 2)
    run(config, stopped, Ranks(), None)
    assert_same(weights(config, run_info.folder), weights(config, stopped.folder))


def test_hooks_are_called_after_each_step_and_their_requests_are_met(config: RunConfig, run_info: RunInfo) -> None:
    heard: list[int] = []
    requests = {0: Request(save=True), 3: Request(stop=True)}  # by the number of steps done
    config = replace(config, checkpoint=replace(config.checkpoint, every_steps=0, keep=9))
    hooks = LoopHooks(lambda: requests.get(len(heard), NO_REQUEST), heard.append)
    run(config, run_info, Ranks(), None, hooks)
    assert heard == [1, 2, 3, 4]
    assert [path.name for path in catalog.list_checkpoints(run_info.folder)] == [
        f"step-{step:08d}" for step in (1, 3, 4)
    ]
