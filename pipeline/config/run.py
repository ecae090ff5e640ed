"""Configuration of a run: one tree of frozen dataclasses, `RunConfig`.

Every class checks itself when it is built, so a wrong value fails on the laptop and not on 64 GPUs. Durations are in
epochs and the batch size is global; `pipeline.schedule` converts them to steps once. Fields hold only numbers, strings,
booleans and tuples, so a configuration survives JSON unchanged (`to_json`, `from_json`). The number of classes is not
here: it comes from the manifest. This module imports neither torch nor ray nor mlflow.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import msgspec

from detr.config import LossConfig, ModelConfig, TransformConfig
from pipeline.config.checks import require
from pipeline.config.data import DataConfig
from pipeline.config.execution import ClusterConfig, ComputeConfig
from pipeline.config.optim import GuardConfig, OptimConfig
from pipeline.config.results import CheckpointConfig, EvaluateConfig, TrackConfig
from pipeline.errors import RunConfigError


@dataclass(frozen=True)
class RunConfig:
    """Complete configuration of a run. `detr show RECIPE` prints it; MLflow stores it."""

    recipe: str = ""
    """Name of the recipe that these options started from; the default name of the run and of the registered model."""
    seed: int = 42
    """Seed of initial weights, data order, augmentation and dropout. The same seed repeats a run."""
    storage: str = "runs"
    """Folder or URL (s3://bucket/runs, or any other that fsspec opens) for all that runs leave: first weights,
    checkpoints, records. Every worker must see it."""
    initial: str = ""
    """Initial weights of the whole model: `models:/NAME@ALIAS` or a file in the original's format (.safetensors, .pth).
    Empty: only the backbone is pre-trained (`model.backbone_weights`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2**32 - 1")
        if self.cluster.workers > self.optim.batch_size:
            raise RunConfigError(
                f"cluster.workers is {self.cluster.workers} but optim.batch_size, which is global, is "
                f"{self.optim.batch_size}; expected at least one image per worker: add --optim.batch-size "
                f"{self.cluster.workers} or a larger one, or lower the workers"
            )
        if self.optim.train == "mask_head" and not self.model.masks:
            raise RunConfigError(
                "optim.train is 'mask_head' but the model has none; expected a model with masks: add --model.masks"
            )
        if self.cluster.workers > 1 and self.model.norm == "batch":
            raise RunConfigError(
                f"model.norm is 'batch' with {self.cluster.workers} workers, each of which would normalise by its own "
                "images; expected losses that do not depend on the number of workers: use frozen_batch, group or one "
                "worker"
            )
        if self.compute.recompute in ("backbone", "both") and self.model.norm == "batch":
            raise RunConfigError(
                f"compute.recompute is {self.compute.recompute!r} with model.norm 'batch', whose statistics would "
                "count every image twice; expected the same model as without it: recompute the encoder only, or use "
                "frozen_batch or group"
            )
        if self.compute.deterministic and self.model.variant == "deformable" and self.cluster.gpu != "no":
            raise RunConfigError(
                "compute.deterministic is set with model.variant 'deformable', whose sampling has no deterministic gradient "
                "on a GPU; expected another variant, --cluster.gpu no, or --compute.no-deterministic"
            )
        if self.compute.graphs:
            self._check_graphs()

    def _check_graphs(self) -> None:
        """Raise `RunConfigError` if an option does not go with CUDA graphs."""
        compute, cluster, norm = self.compute, self.cluster, self.model.norm
        refused = [
            (cluster.gpu == "no", "cluster.gpu", "no", "GPUs"),
            (cluster.workers > 1 and cluster.strategy != "ddp", "cluster.strategy", cluster.strategy, "ddp"),
            (compute.compile, "compute.compile", True, "one of the two"),
            (compute.recompute != "none", "compute.recompute", compute.recompute, "none"),
            (norm == "batch", "model.norm", norm, "frozen_batch or group"),
        ]
        for wrong, name, got, expected in refused:
            require(not wrong, name, got, f"{expected} with compute.graphs, which replays captured passes")

    @property
    def run_name(self) -> str:
        """Name of the run in MLflow and of its folder."""
        return self.track.run_name or self.recipe or "run"

    @property
    def model_name(self) -> str:
        """Name of the registered model that gets this run's best checkpoint as a version."""
        return self.track.register_as or (self.recipe if self.recipe.startswith("detr-") else f"detr-{self.recipe}")


def to_json(config: RunConfig) -> bytes:
    """Return the configuration as indented JSON, with the fields in order of declaration."""
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


def from_json(text: bytes | str) -> RunConfig:
    """Parse the JSON of `to_json`; raise `RunConfigError` with the path of an unknown or mistyped field."""
    try:
        raw = msgspec.json.decode(text)
        config = msgspec.convert(raw, RunConfig)
    except msgspec.DecodeError as error:
        raise RunConfigError(f"the configuration is not valid: {error}; expected what `detr show` prints") from None
    unknown = _unknown_fields(raw, msgspec.to_builtins(config), "$")
    if unknown:
        raise RunConfigError(f"unknown field {unknown[0]} in the configuration; expected what `detr show` prints")
    return config


def _unknown_fields(got: Any, known: Any, path: str) -> list[str]:
    if not (isinstance(got, dict) and isinstance(known, dict)):
        return []
    found = [f"{path}.{key}" for key in got if key not in known]
    return found + [
        name for key in known if key in got for name in _unknown_fields(got[key], known[key], f"{path}.{key}")
    ]


def flatten(config: RunConfig) -> dict[str, str]:
    """Return every field by its path, such as `{"optim.lr": "0.0001"}`: the parameters of the run in MLflow."""

    def walk(node: Any, prefix: str) -> dict[str, str]:
        flat: dict[str, str] = {}
        for item in dataclasses.fields(node):
            value, name = getattr(node, item.name), f"{prefix}{item.name}"
            if dataclasses.is_dataclass(value):
                flat |= walk(value, f"{name}.")
            else:
                flat[name] = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        return flat

    return walk(config, "")
