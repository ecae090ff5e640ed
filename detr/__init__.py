"""DETR in plain PyTorch: End-to-End Object Detection with Transformers (Carion et al., 2020).

The public names below are resolved on first use, so that importing `detr.config` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detr.batch import Batch as Batch
    from detr.batch import Target as Target
    from detr.batch import collate as collate
    from detr.batch import normalise as normalise
    from detr.config import ConfigError as ConfigError
    from detr.config import LossConfig as LossConfig
    from detr.config import ModelConfig as ModelConfig
    from detr.config import TransformConfig as TransformConfig
    from detr.criterion import Losses as Losses
    from detr.criterion import ce_weight_sum as ce_weight_sum
    from detr.criterion import compute_losses as compute_losses
    from detr.matcher import NonFiniteError as NonFiniteError
    from detr.matcher import match as match
    from detr.model import DETR as DETR
    from detr.model import Outputs as Outputs
    from detr.model import build_model as build_model
    from detr.model import freeze_detector as freeze_detector
    from detr.original import load_backbone_weights as load_backbone_weights
    from detr.original import load_detector_state_dict as load_detector_state_dict
    from detr.original import load_original_state_dict as load_original_state_dict
    from detr.original import to_original_state_dict as to_original_state_dict
    from detr.postprocess import Detection as Detection
    from detr.postprocess import detect as detect

_MODULES = {
    "batch": ("Batch", "Target", "collate", "normalise"),
    "config": ("ConfigError", "LossConfig", "ModelConfig", "TransformConfig"),
    "criterion": ("Losses", "ce_weight_sum", "compute_losses"),
    "matcher": ("NonFiniteError", "match"),
    "model": ("DETR", "Outputs", "build_model", "freeze_detector"),
    "original": (
        "load_backbone_weights",
        "load_detector_state_dict",
        "load_original_state_dict",
        "to_original_state_dict",
    ),
    "postprocess": ("Detection", "detect"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'detr' has no attribute {name!r}")
    return getattr(import_module(f"detr.{_HOME[name]}"), name)
