"""Training of `detr` on `shards` with Ray Train and MLflow: configuration, recipes, checkpoints, registry.

Public names are imported on first use, so that importing `pipeline.config` imports neither torch nor ray nor mlflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import RunConfig as RunConfig
    from pipeline.inference.evaluate import evaluate as evaluate
    from pipeline.inference.predict import predict as predict
    from pipeline.recipes import RECIPES as RECIPES
    from pipeline.registry import register as register
    from pipeline.registry import resolve as resolve
    from pipeline.train import resume as resume

_HOME = {
    "RECIPES": "recipes",
    "RunConfig": "config",
    "evaluate": "inference.evaluate",
    "predict": "inference.predict",
    "register": "registry.registration",
    "resolve": "registry.versions",
    "resume": "train",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"pipeline.{_HOME[name]}"), name)
