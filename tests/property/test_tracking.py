"""A run on nodes that are killed and lost at any point, with a server that is away at times: each point once, at last."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.errors import TrackingError
from pipeline.tracking import events, mlflow_sender, spool, spool_folder, unsent
from pipeline.tracking.run_spools import EVALUATION, TRAINING, anything_left, open_tracker, send_left
from pipeline.tracking.spool import SpoolTracker
from shards.store import storage
from tests.support.fake_mlflow import FakeMlflow

STEPS, SAVE_EVERY, EVALUATE_EVERY, NODES = 24, 4, 8, "abc"
ATTEMPTS = 8
PICTURE = Image.new("RGB", (2, 2))


class Killed(BaseException):
    """Raised in a process that is killed."""


class FaultyStore:
    """The run's store, in which a process may be killed before and after each change."""

    def __init__(self, world: "World") -> None:
        self._world = world

    def write(self, url: str, content: bytes) -> None:
        self._world.may_die()
        storage.write(url, content)
        self._world.may_die()

    def remove(self, url: str) -> None:
        self._world.may_die()
        storage.remove(url)
        self._world.may_die()

    def __getattr__(self, name: str) -> Any:
        return getattr(storage, name)


class TornFile:
    """Events file whose writer may be killed after any byte of a line."""

    def __init__(self, world: "World", file: Any) -> None:
        self._world, self._file = world, file

    def write(self, line: bytes) -> int:
        if self._world.dies():
            self._file.write(line[: self._world.chance.randrange(len(line) + 1)])
            raise Killed
        return int(self._file.write(line))

    def close(self) -> None:
        self._file.close()


class World:
    """A run with its store, its nodes and its MLflow; `background` evaluates checkpoints beside training, in any order."""

    def __init__(self, folder: Path, chance: random.Random, background: bool) -> None:
        self.folder, self.chance, self.background = folder, chance, background
        self.run = folder / "run"
        self.mlflow = FakeMlflow()
        self.mlflow.fault = self.fault
        self.deadly, self.away = 0.0, 0.0
        self.saved, self.evaluated, self.time = 0, set[int](), 0
        self.open_files: list[Any] = []
        self.node, self.cut_off = "", dict[str, SpoolTracker]()

    def dies(self) -> bool:
        return self.chance.random() < self.deadly

    def may_die(self) -> None:
        if self.dies():
            raise Killed

    def fault(self) -> None:
        self.may_die()
        if self.chance.random() < self.away:
            raise ConnectionError("away")

    def now(self) -> int:
        self.time += 1
        return self.time

    @contextmanager
    def patched(self) -> Iterator[pytest.MonkeyPatch]:
        """Put this world in place of clock, threads, store, disk and MLflow."""

        def write_cursor(path: Path, content: bytes) -> None:
            self.may_die()
            storage.write_atomic(path, content)
            self.may_die()

        def rename(path: Path, target: Path) -> Path:
            self.may_die()
            path.replace(target)
            self.may_die()
            return target

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SpoolTracker, "_run", lambda _: None)  # this test sends, at points that it chooses
            patch.setattr(spool, "now_ms", self.now)
            patch.setattr(spool_folder, "write_atomic", write_cursor)
            patch.setattr(Path, "rename", rename)
            patch.setattr(spool_folder, "_BATCH", 5)
            patch.setattr(unsent, "storage", FaultyStore(self))
            patch.setattr(mlflow_sender, "connect", lambda _: self.mlflow)
            patch.setattr(events.LOG, "disabled", True)
            patch.setattr(spool.LOG, "disabled", True)
            patch.setattr(spool_folder.LOG, "disabled", True)
            self.patch = patch
            yield patch

    def on(self, node: str) -> None:
        """Let the next process run on a node."""
        self.node = node
        self.cut_off.pop(node, None)
        (self.folder / node).mkdir(exist_ok=True)
        self.patch.setenv("DETR_SCRATCH", str(self.folder / node))

    def open(self, kind: Any) -> SpoolTracker:
        tracker = open_tracker(kind, self.run, "run-id", "fake")
        self.open_files.append(tracker._file)
        tracker._file = TornFile(self, tracker._file)  # type: ignore[assignment]
        if kind is TRAINING and self.chance.random() < 0.5:
            self.cut_off[self.node] = tracker
        return tracker

    def haunt(self) -> None:
        """Let workers that were cut off, and are not killed, send and end now that MLflow can be reached again."""
        for node, tracker in self.cut_off.items():
            sender = tracker._send
            if node != self.node and isinstance(sender, mlflow_sender.EventSender) and sender._claimed:
                sender._reported = None  # its last call has failed
                with suppress(ConnectionError, TrackingError, FileNotFoundError):
                    while tracker._spool.flush(sender):
                        pass
                with suppress(FileNotFoundError):
                    tracker.close()

    def send(self, tracker: SpoolTracker) -> None:
        """Do what the thread of the tracker does."""
        if self.chance.random() < 0.1:
            self.haunt()
        if self.chance.random() < 0.4:
            try:
                while tracker._spool.flush(tracker._send):
                    pass
            except ConnectionError:
                pass

    def evaluate(self, tracker: SpoolTracker, step: int) -> None:
        tracker.checkpoint(f"/run/step-{step}", step, {"val/AP": step / 100, "evaluation/epoch": step / 10})
        self.send(tracker)
        tracker.table("per_class_ap.json", {"step": [step]}, step)
        tracker.picture("detections/0", PICTURE, step)
        self.send(tracker)
        tracker.keep_unsent()
        self.may_die()
        self.evaluated.add(step)

    def pending(self) -> list[int]:
        return [step for step in range(EVALUATE_EVERY, self.saved + 1, EVALUATE_EVERY) if step not in self.evaluated]

    def train(self) -> None:
        """Run an attempt to its end, or until it is killed."""
        tracker = self.open(TRAINING)
        step = self.saved
        while True:
            if not self.background and step in self.pending():
                self.evaluate(tracker, step)
            if step == STEPS:
                break
            step += 1
            tracker.metrics({"train/loss": float(step), "train/total": step + 0.5, "optim/lr": 0.1}, step)
            tracker.tags({"detr.progress": str(step)})
            self.send(tracker)
            if step % SAVE_EVERY == 0:
                tracker.keep_unsent()
                self.may_die()
                self.saved = max(self.saved, step)
        tracker.close()

    def evaluate_in_background(self) -> None:
        """Evaluate one checkpoint as a task of its own."""
        if pending := self.pending():
            tracker = self.open(EVALUATION)
            self.evaluate(tracker, self.chance.choice(pending))
            self.send(tracker)
            tracker.close()

    def act(self) -> None:
        """Run one process on a node, and lose a node at times."""
        self.on(self.chance.choice(NODES))
        act = self.chance.choices([self.train, self.evaluate_in_background, self.end], [5, 3 * self.background, 1])[0]
        with suppress(Killed):
            act()
        if self.chance.random() < 0.2 and self.deadly:
            shutil.rmtree(self.folder / self.chance.choice(NODES), ignore_errors=True)

    def end(self) -> None:
        """Do what the driver does at the end of a run."""
        send_left(self.run, "run-id", "fake", lambda _: None)

    def close(self) -> None:
        for file in self.open_files:
            file.close()


def check(world: World) -> None:
    """Assert that MLflow has everything exactly once."""
    evaluations = list(range(EVALUATE_EVERY, STEPS + 1, EVALUATE_EVERY))
    points = Counter((key, step) for key, step, _, _ in world.mlflow.rows)
    expected = {(key, step) for key in ("train/loss", "train/total", "optim/lr") for step in range(1, STEPS + 1)}
    expected |= {(key, step) for key in ("val/AP", "evaluation/epoch") for step in evaluations}
    assert set(points) == expected
    assert set(points.values()) == {1}
    assert all(value == step for key, step, _, value in world.mlflow.rows if key == "train/loss")
    assert sorted((model.tags["checkpoint_uri"], model.status) for model in world.mlflow.models) == sorted(
        (f"/run/step-{step}", "READY") for step in evaluations
    )
    assert {row for _, row in world.mlflow.linked} == {row for row in world.mlflow.rows if row[0][0] in "ve"}
    pictures = Counter(name.split("+")[2] for name in world.mlflow.files if name.endswith(".webp"))
    assert pictures == {str(step): 1 for step in evaluations}
    assert world.mlflow.tables["per_class_ap.json"]["data"] == [[STEPS]]
    assert not list(world.run.glob("unsent-*"))


@given(st.integers(0, 2**32), st.booleans(), st.sampled_from([0.0, 0.02, 0.1]), st.sampled_from([0.0, 0.1, 1.0]))
@settings(max_examples=40, deadline=None)
def test_every_point_arrives_once(seed: int, background: bool, deadly: float, away: float) -> None:
    with TemporaryDirectory() as folder:
        world = World(Path(folder), random.Random(seed), background)
        with world.patched():
            world.deadly, world.away = deadly, away
            for _ in range(ATTEMPTS):
                world.act()
            world.deadly = world.away = 0.0
            world.on(world.chance.choice(NODES))
            world.train()
            while background and world.pending():
                world.on(world.chance.choice(NODES))
                world.evaluate_in_background()
            world.on(world.chance.choice(NODES))
            assert send_left(world.run, "run-id", "fake", print)
            assert not anything_left(world.run, "run-id")
            check(world)
        world.close()
