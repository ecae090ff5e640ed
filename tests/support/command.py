"""The command as a user runs it: processes in a folder of its own, with real Ray and a real MLflow store there."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from tests.support.ranks import run_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.checkpoint.location import Location
    from pipeline.config import RunConfig
    from pipeline.distributed.ranks import Ranks

# A model that learns nothing in no time: what is tested is that everything holds together.
TINY = [
    "--model.backbone",
    "tiny",
    "--model.hidden-dim",
    "32",
    "--model.heads",
    "2",
    "--model.encoder-layers",
    "1",
    "--model.decoder-layers",
    "2",
    "--model.feedforward-dim",
    "64",
    "--model.num-queries",
    "9",
    "--transform.train-scales",
    "64",
    "--transform.eval-size",
    "64",
    "--transform.max-size",
    "64",
    "--optim.batch-size",
    "4",
    "--evaluate.batch-size",
    "3",
    "--evaluate.every",
    "20",
    "--optim.lr",
    "1e-3",
    "--checkpoint.every-steps",
    "10",
    "--track.log-every",
    "5",
]


# Without these settings, Ray starts idle processes in advance and one that watches for notices of lost nodes, which costs
# seconds for each run, and looks at the workers every two seconds only.
_RAY = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


_OF_OTHERS = (
    *("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"),
    "COLUMNS",  # for which tables are cut
)


class Command:
    """`detr` run in one folder, with its own MLflow store there. What it started is killed at the end of a `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = _RAY | {name: value for name, value in os.environ.items() if name not in _OF_OTHERS}
        self.started: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            if process.stdout is not None and not process.stdout.closed:
                process.communicate()  # closes the pipe

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Start it and return at once."""
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *words],
            cwd=self.folder,
            env=self.env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.started.append(process)
        return process

    def __call__(self, *words: str, status: int = 0) -> str:
        """Run it to the end; its output. Fails unless it exits with `status`."""
        process = self.start(*words)
        output, _ = process.communicate(timeout=900)
        assert process.returncode == status, f"status {process.returncode}, expected {status}: {output}"
        return output

    def wait_for_checkpoint(self, run: str, step: int, home: Path | None = None, timeout_s: float = 600) -> None:
        """Wait until a run of this name has a checkpoint of this step or a later one, in `runs` or another folder."""
        folder, end = home or self.folder / "runs", time.monotonic() + timeout_s
        while time.monotonic() < end:
            found = [path.parent.name for path in folder.glob(f"{run}-*/checkpoints/step-????????/meta.json")]
            if max((int(name.split("-")[1]) for name in found), default=0) >= step:
                return
            time.sleep(0.1)
        raise AssertionError(f"no checkpoint of step {step} within {timeout_s} s")

    def points(self, run: str, key: str) -> list[int]:
        """The steps of a curve, in order, as MLflow's database holds them."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            query = "select step from metrics join runs using (run_uuid) where name = ? and key = ? order by step"
            return [step for (step,) in database.execute(query, (run, key))]

    def tag(self, run: str, key: str) -> str:
        """A tag of the run of this name."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            query = "select value from tags join runs using (run_uuid) where name = ? and key = ?"
            return str(database.execute(query, (run, key)).fetchone()[0])

    def runs_named(self, run: str) -> list[str]:
        """The status of every run of this name."""
        with sqlite3.connect(self.folder / "mlflow.db") as database:
            return [status for (status,) in database.execute("select status from runs where name = ?", (run,))]


def kill(process: psutil.Process) -> None:
    """SIGKILL: no handler, no farewell."""
    os.kill(process.pid, signal.SIGKILL)


def ray_workers(driver: int) -> list[psutil.Process]:
    """The training workers below a driver that started its own Ray."""
    below = psutil.Process(driver).children(recursive=True)
    return [process for process in below if any("RayTrainWorker" in word for word in process.cmdline())]


def config_of(folder: Path, run: str) -> "RunConfig":
    """The configuration that MLflow keeps of the run of this name."""
    from pipeline.config import from_json

    artifacts = folder.glob("mlartifacts/**/config.json")
    (artifact,) = [path for path in artifacts if f'"run_name": "{run}"' in path.read_text()]
    return from_json(artifact.read_bytes())


def newest_weights(config: "RunConfig", run_folder: "Location") -> "dict[str, Tensor]":
    """The weights of the newest checkpoint of the run at this location."""
    from detr.model import build_model
    from pipeline.checkpoint.catalog import newest
    from pipeline.checkpoint.state import load_weights
    from shards.dataset.manifest import load_manifest

    model = build_model(config.model, load_manifest(config.data.train).num_classes)
    path = newest(run_folder)
    assert path is not None
    load_weights(path, model)
    return model.state_dict()


def train_alone(config: "RunConfig", run_folder: "Location", folder: Path) -> list[tuple[str, float, int]]:
    """Train the run at `run_folder` once more from its first weights, into `folder`: undisturbed, and without Ray.

    As many processes as the run has workers train it. Return the points that it reports: name, value and step.
    """
    from pipeline.run_folder import INITIAL_NAME
    from shards.store import storage

    (folder / INITIAL_NAME).write_bytes(storage.read(str(run_folder / INITIAL_NAME)))
    return run_ranks(config.cluster.workers, _train, config, folder)[0]  # type: ignore[no-any-return]


def _train(ranks: "Ranks", config: "RunConfig", folder: Path) -> list[tuple[str, float, int]]:
    from pipeline.training.loop import run
    from pipeline.training.state import RunInfo
    from tests.support.tracker import MemoryTracker

    tracker = MemoryTracker() if ranks.first else None
    run(config, RunInfo("run", folder, "commit"), ranks, tracker)
    return tracker.points if tracker else []


def until(condition: Callable[[], bool], what: str, timeout_s: float = 600) -> None:
    """Wait for it. Looks often, since a kill at a step should not come many steps later, yet leaves the cores to the run."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)
