"""The configuration of a run: one frozen `RunConfig`, its sections, and its JSON.

The docstrings of the fields are the help texts of the flags. The sections of the model, its losses and its augmentation are
in `detr.config`.

May import `pipeline.errors`, `detr.config` and `shards.config`; never torch, Ray or MLflow.
"""

from pipeline.config.checks import require
from pipeline.config.data import DataConfig
from pipeline.config.execution import ClusterConfig, ComputeConfig
from pipeline.config.optim import GuardConfig, OptimConfig
from pipeline.config.results import Batching, CheckpointConfig, EvaluateConfig, Scorer, TrackConfig
from pipeline.config.run import RunConfig, flatten, from_json, to_json

__all__ = [
    "Batching",
    "CheckpointConfig",
    "ClusterConfig",
    "ComputeConfig",
    "DataConfig",
    "EvaluateConfig",
    "GuardConfig",
    "OptimConfig",
    "RunConfig",
    "Scorer",
    "TrackConfig",
    "flatten",
    "from_json",
    "require",
    "to_json",
]
