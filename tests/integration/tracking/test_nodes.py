"""Workers killed on one node and started on another: a real MLflow store on SQLite has each point once."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.run_spools import send_left

ROOT = Path(__file__).parents[3]
STEPS = 120
WORKER = """
import sys, time
from pathlib import Path
from PIL import Image
from pipeline.tracking.run_spools import TRAINING, open_tracker

run, run_id, uri, steps = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
saved = run / "saved"
tracker = open_tracker(TRAINING, run, run_id, uri)
tracker._interval_s = 0.05
step = int(saved.read_text()) if saved.exists() else 0
while step < steps:
    step += 1
    tracker.metrics({"train/loss": float(step), "optim/lr": 0.1}, step)
    if step % 20 == 0:
        tracker.checkpoint(f"/run/step-{step}", step, {"val/AP": step / 1000})
        tracker.picture("detections/0", Image.new("RGB", (8, 8)), step)
        tracker.keep_unsent()
        saved.with_name("new").write_text(str(step))
        saved.with_name("new").rename(saved)
    print(step, flush=True)
    time.sleep(0.02)
tracker.close()
"""


def test_each_point_is_stored_once_after_kills_on_other_nodes(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect()
    run_id = client.create_run(client.create_experiment("nodes")).info.run_id
    run = tmp_path / "run"
    run.mkdir()
    for node, last in (("a", 50), ("b", 90), ("a", 0)):
        monkeypatch.setenv("DETR_SCRATCH", str(tmp_path / node))
        command = [sys.executable, "-c", WORKER, str(run), run_id, store, str(STEPS)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            steps = [int(line) for line in process.stdout if not (last and int(line) >= last and process.kill())]
        assert process.returncode == (-9 if last else 0)
        assert steps
    monkeypatch.setenv("DETR_SCRATCH", str(tmp_path / "driver"))
    assert send_left(run, run_id, store, print)
    with sqlite3.connect(store.removeprefix("sqlite:///")) as database:
        rows = database.execute("select key, step, value from metrics").fetchall()
    expected = [("train/loss", step, float(step)) for step in range(1, STEPS + 1)]
    expected += [("optim/lr", step, 0.1) for step in range(1, STEPS + 1)]
    expected += [("val/AP", step, step / 1000) for step in range(20, STEPS + 1, 20)]
    assert sorted(rows) == sorted(expected)
    models = client.search_logged_models([client.get_run(run_id).info.experiment_id])
    assert sorted(model.tags["step"] for model in models) == sorted(str(step) for step in range(20, STEPS + 1, 20))
    pictures = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".webp")]
    assert sorted(int(path.split("+")[2]) for path in pictures) == list(range(20, STEPS + 1, 20))
    assert [path.name for path in run.iterdir()] == ["saved"]
