"""Background evaluation without Ray: checkpoints that are due, their order, and the end of a run."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import NodeDiedError, OutOfMemoryError, RayTaskError

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.metadata import read_meta
from pipeline.checkpoint.pruning import prune
from pipeline.cluster import background_evaluation
from pipeline.cluster.background_evaluation import Evaluator, sole_evaluation
from pipeline.cluster.notes.notes import Notes
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import Postponed, TrainingError
from pipeline.tracking.pages.pictures import CURVES
from pipeline.training import validation
from pipeline.training.loop import run
from pipeline.training.validation import evaluate_checkpoint
from shards.store.retry import StoreError
from tests.support.runs import start
from tests.support.tracker import MemoryTracker


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """Return a run with checkpoints after steps 1 to 6, which keeps the newest and evaluates those of 3 and 6."""
    return replace(
        tiny_config,
        checkpoint=replace(tiny_config.checkpoint, every_steps=1, keep=1),
        evaluate=replace(tiny_config.evaluate, asynchronous=True),
    )


def steps(paths: list[Location]) -> list[int]:
    return [read_meta(path).step for path in paths]


def test_background_evaluation_gives_the_metrics_of_the_loops_own(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, compute=replace(config.compute, tf32="no"))
    rounding, score = [], validation.evaluate_model

    def observed(*given: Any, **named: Any) -> Any:
        rounding.append(torch.backends.cudnn.allow_tf32)
        return score(*given, **named)

    monkeypatch.setattr(validation, "evaluate_model", observed)
    inside = replace(config, evaluate=replace(config.evaluate, asynchronous=False))
    trackers: list[MemoryTracker] = []
    for name, chosen in (("beside", config), ("inside", inside)):
        trackers.append(MemoryTracker())
        run(chosen, start(chosen, tmp_path / name), Ranks(), trackers[-1])
    home = tmp_path / "beside"
    assert "val/AP" not in {name for name, _, _ in trackers[0].points}
    assert steps(catalog.list_checkpoints(home)) == steps(catalog.pending_evaluation(home)) == [3, 6]
    tracker = MemoryTracker()
    for path in catalog.pending_evaluation(home):
        evaluate_checkpoint(config, path, torch.device("cpu"), tracker)
        prune(catalog.Shelf(home).look(), 1)
    assert catalog.pending_evaluation(home) == []
    assert rounding == [False] * 4  # as the run asks, in both processes
    expected = {(name, step): value for name, value, step in trackers[1].points if name.startswith("val/")}
    assert {(name, step): value for name, value, step in tracker.points if name.startswith("val/")} == expected
    assert len(expected) == 16  # of the 24 figures those whose objects exist
    assert ("evaluation/images", 5.0, 6) in tracker.points
    # The loop explains its evaluations in a thread.
    assert sorted(tracker.pictures) == sorted(picture for picture in trackers[1].pictures if picture[1] > 0)
    assert (CURVES, 6) in tracker.pictures
    of_evaluations = {name: table for name, table in trackers[1].tables.items() if name not in trackers[0].tables}
    assert tracker.tables == of_evaluations
    assert tracker.tables.keys() > {"per_class_ap.json", "precision_recall.json", "worst_images.json"}
    best = [catalog.best(tmp_path / name) for name in ("beside", "inside")]
    assert best[0] is not None
    assert best[1] is not None
    assert (best[0][0].name, best[0][1]) == (best[1][0].name, best[1][1])


class Run:
    """A run whose `fit` saves numbers in place of checkpoints, and whose evaluations are recorded in a list."""

    def __init__(self, config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages = list[str]()
        self.saved, self.evaluated, self.pruned = list[int](), list[int](), list[bool]()
        self.active, self.most = 0, 0
        self.fails: Callable[[int], bool] = lambda step: False
        self.hold = threading.Event()
        self.hold.set()
        pending = lambda shelf: [shelf.root / str(step) for step in self.saved if step not in self.evaluated]  # noqa: E731
        monkeypatch.setattr(catalog.Shelf, "pending", pending)
        monkeypatch.setattr(background_evaluation, "prune", lambda shelf, keep, look: self.pruned.append(True))
        self.stop = threading.Event()
        self.evaluator = Evaluator(config, folder, self.evaluate, self.messages.append, self.stop.is_set, 0.01, 0.01)

    def evaluate(self, path: Location) -> None:
        self.active += 1
        self.most = max(self.most, self.active)
        self.hold.wait(60)
        self.active -= 1
        step = int(path.name)
        if self.fails(step):
            raise TrainingError(f"no figures for {step}")
        self.evaluated.append(step)


@pytest.fixture
def fake(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(config, tmp_path, monkeypatch)


def test_training_does_not_wait_and_the_last_evaluation_ends_the_run(fake: Run) -> None:
    fake.hold.clear()

    def fit() -> None:
        for step in range(1, 6):
            fake.saved.append(step)
            time.sleep(0.02)
        assert fake.evaluated == []  # the first is still held
        threading.Timer(0.1, fake.hold.set).start()

    fake.evaluator.around(fit)()
    fake.evaluator.raise_failure()
    assert fake.evaluated == [1, 2, 3, 4, 5]
    assert fake.most == 1
    assert fake.pruned == [True]
    assert [line for line in fake.messages if "slower than training" in line] == fake.messages[:1]


def test_a_failed_evaluation_is_tried_again_after_training(fake: Run) -> None:
    tries: list[int] = []

    def fails(step: int) -> bool:
        tries.append(step)
        return step == 1 and tries.count(1) == 1

    def fit() -> None:
        fake.saved += [1, 2]
        while 2 not in fake.evaluated:
            time.sleep(0.01)

    fake.fails = fails
    fake.evaluator.around(fit)()
    fake.evaluator.raise_failure()
    assert tries == [1, 2, 1]
    assert fake.messages == ["warning: no figures for 1; it is tried again when training has ended"]


def test_an_evaluation_that_fails_twice_ends_the_run(fake: Run) -> None:
    fake.fails = lambda step: step == 2
    fake.evaluator.around(lambda: fake.saved.extend([1, 2]))()
    with pytest.raises(TrainingError, match=r"^no figures for 2; training is done .* `detr resume` evaluates"):
        fake.evaluator.raise_failure()
    assert fake.evaluated == [1]
    assert fake.pruned == []


@pytest.mark.parametrize("error", [Postponed("the node was lost"), StoreError("no good answer")])
@pytest.mark.parametrize("lasts", [False, True])
def test_an_outage_after_training_is_waited_for_and_leaves_the_run_to_a_later_try(
    fake: Run, error: Exception, lasts: bool
) -> None:
    tries: list[int] = []

    def fails(step: int) -> bool:
        tries.append(step)
        if lasts or len(tries) <= 3:
            raise error
        return False

    fake.fails = fails
    fake.evaluator.around(lambda: fake.saved.append(1))()
    if lasts:
        with pytest.raises(Postponed, match=f"^{error}; training is done"):
            fake.evaluator.raise_failure()
    else:
        fake.evaluator.raise_failure()
        assert fake.evaluated == [1]


def test_only_evaluations_whose_cause_lies_outside_are_tried_again() -> None:
    failed = [RayTaskError("evaluate", "trace", cause) for cause in (StoreError("away"), ValueError("a mistake"))]
    errors = [*failed, NodeDiedError("gone"), OutOfMemoryError("full")]
    assert [background_evaluation._passes(error) for error in errors] == [True, False, True, False]


def test_a_stopped_run_does_not_wait_for_evaluations(fake: Run) -> None:
    fake.hold.clear()

    def fit() -> None:
        fake.saved.append(1)
        while not fake.active:
            time.sleep(0.01)
        fake.stop.set()

    fake.evaluator.around(fit)()
    assert fake.active == 1  # still held
    fake.hold.set()
    assert fake.pruned == []


def test_failed_training_does_not_wait_for_evaluations(fake: Run) -> None:
    fake.hold.clear()

    def fit() -> None:
        fake.saved.append(1)
        raise TrainingError("no")

    with pytest.raises(TrainingError, match=r"^no$"):
        fake.evaluator.around(fit)()
    fake.hold.set()


def test_an_evaluation_that_is_believed_lost_ends_before_its_successor_works(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_evaluation, "_HEARS_S", 0.05)
    order: list[str] = []
    lost = sole_evaluation(notes, lambda: order.append("the lost one ended"))
    with lost, sole_evaluation(notes):
        order.append("its successor works")
    assert order[0] == "the lost one ended"
    assert "its successor works" in order


def test_an_evaluation_does_not_wait_for_one_that_has_ended(notes: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background_evaluation, "_HEARS_S", 60)
    for _ in range(2):
        with sole_evaluation(notes):
            pass
