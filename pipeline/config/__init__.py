"""The configuration of a run: one frozen `RunConfig`, its sections, and its JSON.

May import `pipeline.errors`, `detr.config` and `shards.config`; never torch, Ray or MLflow.
"""

from pipeline.config.run import RunConfig, flatten, from_json, to_json
from pipeline.config.sections import (
    Batching,
    CheckpointConfig,
    ClusterConfig,
    ComputeConfig,
    DataConfig,
    EvaluateConfig,
    GuardConfig,
    OptimConfig,
    Scorer,
    TrackConfig,
    require,
)

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
