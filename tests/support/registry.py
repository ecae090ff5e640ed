"""Runs of one step, trained and evaluated, from which tests register versions."""

from dataclasses import dataclass
from pathlib import Path

import torch
from mlflow import MlflowClient

from detr.model import build_model
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.tracking.mlflow_client import connect
from pipeline.tracking.mlflow_runs import create_run
from pipeline.tracking.pages.data import data_set
from pipeline.tracking.tags import TAG_FOLDER
from pipeline.training.loop import run
from pipeline.training.model import save_initial
from pipeline.training.state import RunInfo
from shards.dataset.manifest import load_manifest


@dataclass(frozen=True)
class Trained:
    """A run of one step, evaluated."""

    client: MlflowClient
    config: RunConfig
    run_id: str
    folder: Path
    artifacts: Path


def train_in(root: Path, config: RunConfig) -> Trained:
    client, folder = connect(), root / "runs" / "tiny"
    data = {"training": config.data.train, "validation": config.data.val}
    used = {use: data_set(load_manifest(url)) for use, url in data.items()}
    run_id = create_run(client, config, used, {TAG_FOLDER: str(folder)})
    torch.manual_seed(0)
    save_initial(build_model(config.model, 4), folder)
    run(config, RunInfo(run_id, folder, "abc123"), Ranks(), None)
    return Trained(client, config, run_id, folder, root / "mlartifacts")
