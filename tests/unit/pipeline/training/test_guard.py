"""Handling of diverged steps in the loop."""

import pickle
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest
import torch

from detr.batch import Batch
from detr.model import build_model
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Url
from pipeline.checkpoint.metadata import read_meta
from pipeline.checkpoint.saver import Saver
from pipeline.config import GuardConfig, RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import TrainingError
from pipeline.tracking.tags import TAG_WARNING
from pipeline.training import guard, loop
from pipeline.training.divergence import Diverged
from pipeline.training.loop import run
from pipeline.training.model import save_initial
from pipeline.training.requests import NO_REQUEST, LoopHooks, Request
from pipeline.training.state import RunInfo
from pipeline.training.step import StepResult, train_step
from shards.store import storage
from shards.store.retry import StoreError
from tests.support.tracker import MemoryTracker

STEPS = 6
Weights = dict[str, torch.Tensor]


@pytest.fixture
def start(tiny_config: RunConfig, tmp_path: Path) -> RunInfo:
    torch.manual_seed(0)
    save_initial(build_model(tiny_config.model, 4), tmp_path)
    return RunInfo("run", tmp_path, "commit")


def guarded(config: RunConfig, **options: Any) -> RunConfig:
    """Return the tiny run with checkpoints after steps 2, 3, 4 and 6, all of them kept."""
    return replace(config, checkpoint=replace(config.checkpoint, every_steps=2, keep=9), guard=GuardConfig(**options))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Return steps whose boxes get a NaN, with the image ids of each step once it has run."""
    steps: dict[int, list[int]] = {}

    def step(model: Any, batches: Sequence[Batch], *more: Any) -> StepResult:
        number = more[3]
        if number in steps:
            steps[number] = [target.image_id for batch in batches for target in batch.targets]
            next(target for target in batches[0].targets if len(target.boxes)).boxes[0, 2] = torch.nan
        return train_step(model, batches, *more)

    monkeypatch.setattr(loop, "train_step", step)
    return steps


def weights(config: RunConfig, folder: Path, step: int) -> Weights:
    model = build_model(config.model, 4)
    checkpoint_state.load_weights(catalog.folder_of(folder, step), model)
    return model.state_dict()


def same(first: Weights, second: Weights) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def events(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "events").glob("*.json"))
    return [msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) for path in paths]


def test_reports_of_an_event_do_not_read_the_store(
    tiny_config: RunConfig, start: RunInfo, poisoned: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned[3] = []
    report, listing = guard.Guard._report, storage.listing

    def away(url: str) -> dict[str, int]:
        raise StoreError(f"{url}: no good answer")

    def report_without_store(self: guard.Guard, event: Diverged, count: int) -> None:
        monkeypatch.setattr(storage, "listing", away)
        report(self, event, count)
        monkeypatch.setattr(storage, "listing", listing)

    monkeypatch.setattr(guard.Guard, "_report", report_without_store)
    tracker = MemoryTracker()
    run(guarded(tiny_config, policy="skip"), start, Ranks(), tracker)
    assert tracker.tables["guard_events.json"]["step"] == ["3"]


def test_stop_ends_the_run_before_the_update_and_keeps_the_event(
    tiny_config: RunConfig, start: RunInfo, poisoned: dict[int, list[int]]
) -> None:
    poisoned[3] = []
    with pytest.raises(
        Diverged, match=r"step 3: not finite before the update: rank 0: .* target boxes of images \d+"
    ) as raised:
        run(guarded(tiny_config), start, Ranks(), MemoryTracker())
    assert catalog.newest(start.folder) == catalog.folder_of(start.folder, 3)
    assert f"; kept in {start.folder / 'events' / 'step-00000003.json'}" in str(raised.value)
    (event,) = events(start.folder)
    assert (event["step"], event["policy"], event["grad_norm"]) == (3, "stop", "nan")
    assert event["ranks"][0]["images"] == poisoned[3]


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(Diverged("step 3: no", 3, {"grad_norm": "nan"})))  # noqa: S301
    assert (str(error), error.step, error.record) == ("step 3: no", 3, {"grad_norm": "nan"})


def test_skip_leaves_the_update_out_and_continues_to_the_last_step(
    tiny_config: RunConfig, start: RunInfo, poisoned: dict[int, list[int]]
) -> None:
    poisoned[2] = []
    tracker, config = MemoryTracker(), guarded(tiny_config, policy="skip")
    run(config, start, Ranks(), tracker)
    assert same(weights(config, start.folder, 3), weights(config, start.folder, 2))
    assert not same(weights(config, start.folder, 4), weights(config, start.folder, 3))
    assert catalog.newest(start.folder) == catalog.folder_of(start.folder, STEPS)
    assert ("guard/events", 1.0, 2) in tracker.points
    assert tracker.tables["guard_events.json"]["step"] == ["2"]
    assert tracker.last_tags["detr.guard"].startswith("1 skip: step 2: not finite")
    assert re.fullmatch(
        r"step 2 skipped: not finite before the update: .* of images \[?\d+.* \(1 of 3\)",
        tracker.last_tags[f"{TAG_WARNING}.guard.1"],
    )
    assert "--optim.lr" not in tracker.last_tags[f"{TAG_WARNING}.guard.1"]


def test_rollback_restores_the_newest_weights_and_continues_the_stream(
    tiny_config: RunConfig, start: RunInfo, poisoned: dict[int, list[int]]
) -> None:
    poisoned[5] = []
    config = guarded(tiny_config, policy="rollback")
    run(config, start, Ranks(), MemoryTracker())
    last = catalog.folder_of(start.folder, STEPS)
    assert catalog.newest(start.folder) == last
    assert read_meta(last).samples == STEPS * 4
    # The fifth step is undone, and the sixth skipped.
    assert same(weights(config, start.folder, STEPS), weights(config, start.folder, 4))


def test_rollback_before_the_first_checkpoint_is_an_error(
    tiny_config: RunConfig, start: RunInfo, poisoned: dict[int, list[int]]
) -> None:
    poisoned[1] = []
    with pytest.raises(TrainingError, match=r"skip\): there is no checkpoint to return to yet"):
        run(guarded(tiny_config, policy="rollback"), start, Ranks(), None)


def test_a_norm_above_the_bound_is_a_divergence(tiny_config: RunConfig, start: RunInfo) -> None:
    message = r"step 0: the gradient's norm is past guard.max_grad_norm \(\S+ > 1e-06\); images \[\d+"
    with pytest.raises(Diverged, match=message):
        run(guarded(tiny_config, max_grad_norm=1e-6), start, Ranks(), None)


def test_too_many_events_end_the_run_and_repeated_steps_count_once(
    tiny_config: RunConfig, start: RunInfo, poisoned: dict[int, list[int]]
) -> None:
    poisoned |= {2: [], 4: [], 5: []}
    config = guarded(tiny_config, policy="skip", max_events=2)
    for _ in range(2):  # the second time from the checkpoint of step 4, whose event is repeated
        with pytest.raises(TrainingError, match=r"^step 5: .*this is event 3, and guard.max_events allows 2"):
            run(config, start, Ranks(), None)
        assert [event["step"] for event in events(start.folder)] == [2, 4, 5]


def test_a_run_continues_from_a_checkpoint_before_the_first_update(
    tiny_config: RunConfig, tmp_path: Path, poisoned: dict[int, list[int]]
) -> None:
    poisoned[0] = []
    config = guarded(tiny_config, policy="skip")
    found = []
    for every, stops in ((1, (1, 0)), (0, (0,))):
        run_info = RunInfo("run", tmp_path / str(every), "commit")
        torch.manual_seed(0)
        save_initial(build_model(config.model, 4), run_info.folder)
        for stop in stops:
            saved = replace(config.checkpoint, every_steps=every)
            run(replace(config, checkpoint=saved, optim=replace(config.optim, max_steps=stop)), run_info, Ranks(), None)
        found.append(weights(config, run_info.folder, STEPS))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_request_at_a_skipped_step_is_fulfilled(
    tiny_config: RunConfig, start: RunInfo, poisoned: dict[int, list[int]]
) -> None:
    poisoned[0] = []
    requests = iter([Request(save=True)])
    run(guarded(tiny_config, policy="skip"), start, Ranks(), None, LoopHooks(lambda: next(requests, NO_REQUEST)))
    assert catalog.list_checkpoints(start.folder)[0] == catalog.folder_of(start.folder, 1)


def test_the_wait_for_a_rollback_is_not_counted_as_step_time(
    tiny_config: RunConfig, start: RunInfo, poisoned: dict[int, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: Saver, *more: Any) -> bool:
        time.sleep(0.3)
        return write(self, *more)

    write = Saver._write
    monkeypatch.setattr(Saver, "_write", slow)
    poisoned[2] = []
    tracker = MemoryTracker()
    run(guarded(tiny_config, policy="rollback"), start, Ranks(), tracker)
    times = [value for name, value, _ in tracker.points if name.startswith("step/")]
    assert times
    assert min(times) >= 0


def test_events_are_kept_in_a_store_behind_a_url(tiny_config: RunConfig, poisoned: dict[int, list[int]]) -> None:
    root = Url("memory://bucket/runs/tiny-1")
    poisoned[2] = []
    try:
        save_initial(build_model(tiny_config.model, 4), root)
        run(guarded(tiny_config, policy="skip"), RunInfo("run", root, "commit"), Ranks(), None)
        names = [name for name in storage.listing(str(root)) if name.startswith("events/")]
        assert names == ["events/step-00000002.json"]
        assert catalog.newest(root) == catalog.folder_of(root, STEPS)
    finally:
        fsspec.filesystem("memory").store.clear()
