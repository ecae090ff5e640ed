"""Data sets of WebDataset shards: written from COCO and other formats, planned, read and scored.

Public names are imported on first use, so that `import shards` is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shards.config import PlanConfig as PlanConfig
    from shards.config import ReadConfig as ReadConfig
    from shards.config import WriteConfig as WriteConfig
    from shards.dataset.categories import Category as Category
    from shards.dataset.index import Index as Index
    from shards.dataset.manifest import Manifest as Manifest
    from shards.dataset.manifest import load_manifest as load_manifest
    from shards.dataset.verify import verify as verify
    from shards.errors import ShardError as ShardError
    from shards.masks.rle import decode_masks as decode_masks
    from shards.masks.rle import encode_masks as encode_masks
    from shards.panoptic.segments import TrueSegments as TrueSegments
    from shards.plan.epoch import EpochPlan as EpochPlan
    from shards.plan.epoch import epoch_order as epoch_order
    from shards.plan.epoch import plan_epoch as plan_epoch
    from shards.plan.epoch import plan_evaluation as plan_evaluation
    from shards.plan.steps import Origin as Origin
    from shards.plan.steps import Steps as Steps
    from shards.read.loader import open_batches as open_batches
    from shards.read.loader import open_loader as open_loader
    from shards.read.loader import read_samples as read_samples
    from shards.read.sample import Sample as Sample
    from shards.read.segmentations import check_segmentations as check_segmentations
    from shards.read.stock import open_webdataset as open_webdataset
    from shards.read.stock import verify_stock as verify_stock
    from shards.score.coco_eval import ClassScore as ClassScore
    from shards.score.coco_eval import Score as Score
    from shards.score.coco_eval import coco_metrics as coco_metrics
    from shards.score.coco_eval import score_detections as score_detections
    from shards.score.detections import Detections as Detections
    from shards.source.defects import SourceError as SourceError
    from shards.synthetic import write_synthetic as write_synthetic
    from shards.write.writer import write_coco as write_coco
    from shards.write.writer import write_panoptic as write_panoptic

_HOMES = {
    "config": ("PlanConfig", "ReadConfig", "WriteConfig"),
    "dataset.categories": ("Category",),
    "dataset.index": ("Index",),
    "dataset.manifest": ("Manifest", "load_manifest"),
    "dataset.verify": ("verify",),
    "errors": ("ShardError",),
    "masks.rle": ("decode_masks", "encode_masks"),
    "panoptic.segments": ("TrueSegments",),
    "plan.epoch": ("EpochPlan", "epoch_order", "plan_epoch", "plan_evaluation"),
    "plan.steps": ("Origin", "Steps"),
    "read.loader": ("open_batches", "open_loader", "read_samples"),
    "read.sample": ("Sample",),
    "read.segmentations": ("check_segmentations",),
    "read.stock": ("open_webdataset", "verify_stock"),
    "score.coco_eval": ("ClassScore", "Score", "coco_metrics", "score_detections"),
    "score.detections": ("Detections",),
    "source.defects": ("SourceError",),
    "synthetic": ("write_synthetic",),
    "write.writer": ("write_coco", "write_panoptic"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
