"""Sections of evaluations, checkpoints and MLflow: what a run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detr.config import check_literals
from pipeline.config.checks import require

Batching = Literal["same_size", "padded", "fixed"]
"""Rule for grouping images into evaluation batches; see `EvaluateConfig`."""
Scorer = Literal["hotcoco", "pycocotools"]
"""Library that computes the metrics of an evaluation; see `EvaluateConfig`."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during a run, on the validation data; each image counts once."""

    every: int = 1
    """Number of epochs between evaluations. The last step is always evaluated."""
    batch_size: int = 2
    """Maximum number of images per forward pass in evaluation. The scores do not depend on the number of workers."""
    batching: Batching = "same_size"
    """Rule for images that share an evaluation batch.
    same_size: only images of the same size, so nothing is padded and scores do not depend on `batch_size`.
    padded: images of similar shape, padded to the largest, as in the original; changes scores slightly.
    fixed: pad all images to one square."""
    asynchronous: bool = False
    """Evaluate checkpoints in the background while training continues, on CPUs or a GPU that no worker uses."""
    limit: int = 0
    """Maximum number of validation images, for a smoke test only. 0: all of them."""
    pictures: int = 4
    """Number of validation images that are logged at each evaluation with detections next to the ground truth."""
    explain: bool = True
    """Log the reasons of each score as well: kinds of errors, calibration, worst images, suspect labels.
    It takes two seconds for 5,000 images, in a thread of rank 0 while training continues."""
    scorer: Scorer = "hotcoco"
    """Library that computes the metrics; both give the same numbers.
    hotcoco: a second for 5,000 images.
    pycocotools: the reference; a minute for 5,000 images, while all workers wait."""

    def __post_init__(self) -> None:
        check_literals(self, require, "evaluate.")
        require(self.limit >= 0, "evaluate.limit", self.limit, "0 (all) or more")
        require(self.every >= 1, "evaluate.every", self.every, "at least 1 epoch")
        require(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "at least 1")
        require(self.pictures >= 0, "evaluate.pictures", self.pictures, "0 or more")


@dataclass(frozen=True)
class CheckpointConfig:
    """Interval, storage and retention of checkpoints. The newest and the best are always kept."""

    every_steps: int = 500
    """Number of steps between checkpoints. 0: save only before evaluations and at the end.
    A failure costs the steps since the last checkpoint."""
    every_minutes: float = 0.0
    """Maximum number of minutes between checkpoints, in addition to `every_steps`. 0: no time limit."""
    keep: int = 2
    """Number of newest checkpoints to keep, in addition to the best."""
    keep_every_epochs: int = 0
    """Number of epochs between checkpoints that are never deleted. 0: none."""
    store: str = ""
    """Folder or URL for checkpoints (s3://bucket/runs, or any other that fsspec opens); each run gets a folder in it.
    Empty: the folder of the run."""

    def __post_init__(self) -> None:
        require(self.every_steps >= 0, "checkpoint.every_steps", self.every_steps, "0 or more")
        require(self.every_minutes >= 0, "checkpoint.every_minutes", self.every_minutes, "0 (no clock) or more")
        require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")
        require(self.keep_every_epochs >= 0, "checkpoint.keep_every_epochs", self.keep_every_epochs, "0 (none) or more")


@dataclass(frozen=True)
class TrackConfig:
    """Names in MLflow and its model registry, and how often curves get a point."""

    experiment: str = "detr"
    """MLflow experiment of the run."""
    run_name: str = ""
    """Name of the run in MLflow and of its folder. Empty: the name of the recipe."""
    register_as: str = ""
    """Registered model that gets the best checkpoint as a new version.
    Empty: the name of the recipe, with `detr-` in front."""
    register: Literal["best", "never", "always"] = "best"
    """Registration of the best checkpoint when the run ends.
    best: as a new version; `@best` moves to it unless it is on one with a higher AP on the same data.
    always: as a new version, and `@best` moves to it whatever its AP.
    never: no version. `detr register RUN --name NAME` makes one later."""
    log_every: int = 50
    """Number of steps between points of the training curves."""
    system_every_s: float = 10.0
    """Seconds between points of the system metrics: load of CPU, memory, disk, network and GPUs of each node. 0: none."""
    wait_s: float = 600.0
    """Seconds that a trained run waits for an MLflow that does not answer, before the registration is left to the next
    command. Training itself never waits for MLflow."""

    def __post_init__(self) -> None:
        check_literals(self, require, "track.")
        require(self.system_every_s >= 0, "track.system_every_s", self.system_every_s, "a number of seconds, or 0")
        require(self.wait_s >= 0, "track.wait_s", self.wait_s, "a number of seconds, or 0")
        require(bool(self.experiment), "track.experiment", self.experiment, "a name")
        # The registry would refuse them too, but only at the end of the run.
        nameable = not set(self.register_as) & set("/:")
        require(nameable, "track.register_as", self.register_as, "a name without / and :")
        require(self.log_every >= 1, "track.log_every", self.log_every, "at least 1 step")
