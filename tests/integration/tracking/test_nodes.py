"""Workers killed on one node and started on another: a real MLflow store on SQLite has each point once."""

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from pipeline.errors import TrackingError
from pipeline.tracking.events import Event
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import experiment_id
from pipeline.tracking.mlflow_sender import EventSender
from pipeline.tracking.run_spools import send_left
from pipeline.tracking.spool_folder import SpoolFolder

ROOT = Path(__file__).parents[3]
STEPS = 60
WORKER = """
import sys, time
from pathlib import Path
from PIL import Image
from pipeline.tracking.run_spools import TRAINING, open_tracker

run, run_id, uri, last = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
saved = run / "saved"
tracker = open_tracker(TRAINING, run, run_id, uri)
step = int(saved.read_text()) if saved.exists() else 0
while step < last:
    step += 1
    tracker.metrics({"train/loss": float(step), "optim/lr": 0.1}, step)
    if step % 20 == 0:
        tracker.checkpoint(f"/run/step-{step}", step, {"val/AP": step / 1000})
        tracker.picture("detections/0", Image.new("RGB", (8, 8)), step)
        tracker.keep_unsent()
        saved.with_name("new").write_text(str(step))
        saved.with_name("new").rename(saved)
if step < 60:
    time.sleep(600)  # until it is killed
tracker.close()
"""


def points(store: str) -> list[tuple[str, int, float]]:
    """Return the points in the store's database."""
    with sqlite3.connect(store.removeprefix("sqlite:///"), timeout=60) as database:
        return database.execute("select key, step, value from metrics order by key, step").fetchall()


def test_each_point_is_stored_once_after_kills_on_other_nodes(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    run_id = client.create_run(experiment_id(client, "nodes")).info.run_id
    run = tmp_path / "run"
    run.mkdir()
    for node, last in (("a", 30), ("b", 50), ("a", STEPS)):
        monkeypatch.setenv("DETR_SCRATCH", str(tmp_path / node))
        command = [sys.executable, "-c", WORKER, str(run), run_id, store, str(last)]
        with subprocess.Popen(command, cwd=ROOT) as process:
            until = time.monotonic() + 120
            # The steps since the last checkpoint are in the store, and the next attempt computes them again.
            while last < STEPS and ("train/loss", last, float(last)) not in points(store):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.1)
            if last < STEPS:
                process.kill()
    monkeypatch.setenv("DETR_SCRATCH", str(tmp_path / "driver"))
    assert send_left(run, run_id, store, print)
    steps, evaluated = range(1, STEPS + 1), list(range(20, STEPS + 1, 20))
    expected = [("train/loss", step, float(step)) for step in steps] + [("optim/lr", step, 0.1) for step in steps]
    assert points(store) == sorted(expected + [("val/AP", step, step / 1000) for step in evaluated])
    models = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert sorted(int(model.tags["step"]) for model in models) == evaluated
    pictures = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".webp")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == evaluated
    assert [path.name for path in run.iterdir()] == ["saved"]


def test_a_node_that_was_cut_off_sends_nothing_once_another_sends(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    run_id = client.create_run(experiment_id(client, "nodes")).info.run_id
    senders = {}
    for node in ("a", "b"):
        SpoolFolder(tmp_path / node).create()
        senders[node] = EventSender(store, run_id, tmp_path / node)

    def point(step: int) -> list[Event]:
        return [Event("metrics", step, step=step, values={"train/loss": 1.0})]

    def cut(*_: object, **__: object) -> None:
        raise ConnectionError

    senders["a"](point(1))
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", cut)
        with pytest.raises(ConnectionError):
            senders["a"](point(2))
    senders["b"](point(2))
    with pytest.raises(TrackingError, match="another node continues the run"):
        senders["a"](point(3))
    assert [step for _, step, _ in points(store)] == [1, 2]
    EventSender(store, run_id, tmp_path / "a")(point(3))  # a new attempt on the first node
    assert [step for _, step, _ in points(store)] == [1, 2, 3]
