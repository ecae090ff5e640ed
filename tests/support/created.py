"""A run that is made in MLflow, without training, and events of one."""

from dataclasses import replace
from pathlib import Path

from mlflow import MlflowClient
from PIL import Image

from pipeline.config import RunConfig
from pipeline.tracking.events import Event
from pipeline.tracking.mlflow_runs import create_run
from pipeline.tracking.pages.data import data_set
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.tags import TAG_FOLDER
from shards.dataset.manifest import load_manifest


def created(client: MlflowClient, config: RunConfig, name: str = "") -> str:
    """Return the id of a run of this configuration and name."""
    train, val = load_manifest(config.data.train), load_manifest(config.data.val)
    datasets = {"training": data_set(train), "validation": data_set(val)}
    named = replace(config, track=replace(config.track, run_name=name))
    return create_run(client, named, datasets, {TAG_FOLDER: "/runs/one", "detr.train_digest": train.digest})


def spooled(folder: Path) -> list[Event]:
    """Return one event of every kind, with pictures in the folder."""
    taken: list[Event] = []
    tracker = SpoolTracker(folder, taken.extend, interval_s=0.01)
    tracker.tags({"detr.phase": "training"})
    for step in (1, 2, 3):
        tracker.metrics({"train/loss": 3.0 - step, "optim/lr": 0.1}, step)
    tracker.picture("detections/0", Image.new("RGB", (8, 6), "red"), 3)
    tracker.checkpoint("/runs/one/checkpoints/step-00000003", 3, {"val/AP": 0.25, "val/APs": -1.0})
    tracker.table("per_class_ap.json", {"name": ["cat", "dog"], "AP": [0.5, 0.0]}, 3)
    tracker.file("images/newest.png", b"the newest", 3)
    tracker.tags({"detr.phase": "evaluating"})
    tracker.close()
    return taken
