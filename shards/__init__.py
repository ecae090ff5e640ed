"""Data sets of WebDataset shards: written from COCO and other formats, planned, read and scored.

Public names are imported on first use, so that `import shards` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.config import WriteConfig as WriteConfig
    from shards.detections import Detections as Detections
    from shards.errors import ShardError as ShardError
    from shards.index import Index as Index
    from shards.manifest import Category as Category
    from shards.manifest import Manifest as Manifest
    from shards.manifest import load_manifest as load_manifest
    from shards.plan import EpochPlan as EpochPlan
    from shards.plan import PlanConfig as PlanConfig
    from shards.plan import epoch_order as epoch_order
    from shards.plan import plan_epoch as plan_epoch
    from shards.plan import plan_evaluation as plan_evaluation
    from shards.read import ReadConfig as ReadConfig
    from shards.read import open_batches as open_batches
    from shards.read import open_loader as open_loader
    from shards.read import read_samples as read_samples
    from shards.sample import Sample as Sample
    from shards.score import ClassScore as ClassScore
    from shards.score import Score as Score
    from shards.score import coco_metrics as coco_metrics
    from shards.score import score_detections as score_detections
    from shards.segmentation import check_segmentations as check_segmentations
    from shards.segmentation import decode_masks as decode_masks
    from shards.segmentation import encode_masks as encode_masks
    from shards.source import SourceError as SourceError
    from shards.steps import Origin as Origin
    from shards.steps import Steps as Steps
    from shards.stock import open_webdataset as open_webdataset
    from shards.stock import verify_stock as verify_stock
    from shards.synthetic import write_synthetic as write_synthetic
    from shards.verify import verify as verify
    from shards.write import write_coco as write_coco

_HOMES = {
    "config": ("WriteConfig",),
    "detections": ("Detections",),
    "errors": ("ShardError",),
    "manifest": ("Category", "Manifest", "load_manifest"),
    "index": ("Index",),
    "plan": ("EpochPlan", "PlanConfig", "epoch_order", "plan_epoch", "plan_evaluation"),
    "read": ("ReadConfig", "open_batches", "open_loader", "read_samples"),
    "sample": ("Sample",),
    "score": ("ClassScore", "Score", "coco_metrics", "score_detections"),
    "segmentation": ("check_segmentations", "decode_masks", "encode_masks"),
    "source": ("SourceError",),
    "steps": ("Origin", "Steps"),
    "stock": ("open_webdataset", "verify_stock"),
    "synthetic": ("write_synthetic",),
    "verify": ("verify",),
    "write": ("write_coco",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
