"""Reasons of a score: kinds of errors and their cost, confused classes, calibration, worst images, suspect labels.

TIDE's error kinds, the confusion and the calibration are hotcoco's, of boxes at IoU 0.50 and up to 100 detections per
image. See Bolya et al., "TIDE: A General Toolbox for Identifying Object Detection Errors", 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.arrays import Ints
from shards.dataset.manifest import Manifest
from shards.score import with_hotcoco
from shards.score.comparison import Comparison, compare
from shards.score.detections import Detections
from shards.score.overlaps import found_objects, overlaps
from shards.score.suspects import Suspect, find_suspects
from shards.score.worst_images import JudgedImage, find_worst_and_best

THRESHOLD = 0.5
"""Lowest score of a detection in the confusion."""
ERROR_KINDS = {
    "class": "Cls",
    "box": "Loc",
    "class_and_box": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}
"""TIDE's six kinds, by the names that curves have here."""
_OBJECTS = {"1": (1, 1), "2-4": (2, 4), "5-9": (5, 9), "10-19": (10, 19), "20+": (20, None)}


@dataclass(frozen=True)
class Bin:
    """Detections of similar score: mean score, share of correct ones, number."""

    score: float
    correct: float
    count: int


@dataclass(frozen=True)
class ByObjects:
    """AP50 of the images with so many objects, crowds left out; -1 without such images."""

    objects: str
    images: int
    ap50: float


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """Reasons of a score."""

    ap50: float
    errors: dict[str, float]
    """AP50 that each of ERROR_KINDS costs: how much higher it would be without these errors, all others kept."""
    error_counts: dict[str, int]
    confusion: Ints
    """Numbers of objects by true and found label, int64 [K + 1, K + 1]; the last ones are "nothing"."""
    calibration: tuple[Bin, ...]
    """Bins of scores in ascending order, without empty ones."""
    calibration_error: float
    """Mean difference between score and share of correct detections, weighted by their numbers."""
    by_objects: tuple[ByObjects, ...]
    worst: tuple[JudgedImage, ...]
    best: tuple[JudgedImage, ...]
    suspects: tuple[Suspect, ...]


def diagnose(
    manifest: Manifest,
    detections: Detections,
    *,
    rows: Ints | None = None,
    worst: int = 20,
    best: int = 4,
    suspects: int = 20,
) -> Diagnosis:
    """Return the reasons of the score of boxes, with so many images and suspects; raise as `coco_metrics`."""
    comparison = compare(manifest, detections, rows, masks=False)
    evaluator = with_hotcoco.evaluator(comparison, "bbox")
    params = evaluator.params
    params.iou_thrs, params.max_dets = [0.5], [100]
    params.area_rng, params.area_rng_lbl = params.area_rng[:1], params.area_rng_lbl[:1]  # the first are all sizes
    evaluator.params = params
    evaluator.evaluate()
    tide, calibration = evaluator.tide_errors(), evaluator.calibration()
    pairs = overlaps(comparison)
    found = found_objects(comparison, pairs)
    most_wrong, most_right = find_worst_and_best(manifest, comparison, pairs, found, worst, best)
    confusion = evaluator.confusion_matrix(min_score=THRESHOLD)["matrix"]
    return Diagnosis(
        ap50=tide["ap_base"],
        errors={name: tide["delta_ap"][key] for name, key in ERROR_KINDS.items()},
        error_counts={name: tide["counts"][key] for name, key in ERROR_KINDS.items()},
        confusion=confusion.astype(np.int64),
        calibration=tuple(
            Bin(group["avg_confidence"], group["avg_accuracy"], group["count"])
            for group in calibration["bins"]
            if group["count"]
        ),
        calibration_error=calibration["ece"],
        by_objects=_by_objects(comparison, evaluator),
        worst=most_wrong,
        best=most_right,
        suspects=find_suspects(manifest, comparison, pairs, found, suspects),
    )


def _by_objects(comparison: Comparison, evaluator: Any) -> tuple[ByObjects, ...]:
    counted = comparison.truth_images[comparison.truth["iscrowd"] == 0]
    objects = np.bincount(counted, minlength=len(comparison.rows))
    images = {
        name: np.flatnonzero(
            (objects >= low) & (objects <= (objects.max(initial=0) if high is None else high))
        ).tolist()
        for name, (low, high) in _OBJECTS.items()
    }
    slices = evaluator.slice_by(images)
    return tuple(ByObjects(name, len(images[name]), slices[name]["AP50"] if images[name] else -1.0) for name in images)
