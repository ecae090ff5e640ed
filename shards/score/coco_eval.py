"""Score detections: the twelve COCO metrics, per-class AP and the curves behind them.

The truth comes from the data set's index, and its masks from the shards, so that scoring needs no COCO JSON. As
pycocotools does with results that hold only masks, a true object is small, medium or large by its annotation's area,
for masks as for boxes, and a detected one by the pixels of its mask. Both scorers give the same numbers, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from shards.arrays import Ints
from shards.dataset.manifest import Manifest
from shards.score import with_hotcoco, with_pycocotools
from shards.score.comparison import Comparison, compare
from shards.score.detections import Detections
from shards.score.precision_recall import Curves, Precision, mean_curves

Scorer = Literal["hotcoco", "pycocotools"]
_SCORERS = {"hotcoco": with_hotcoco.evaluate, "pycocotools": with_pycocotools.evaluate}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MASK_METRICS = tuple(f"mask_{name}" for name in METRICS)


@dataclass(frozen=True)
class ClassScore:
    """AP (IoU 0.50:0.95) and AP50 of a category, -1 if there is no truth of it, and the number of its true boxes.

    `mask_ap` and `mask_ap50` are those of the masks, None if no masks were predicted.
    """

    label: int
    category_id: int
    name: str
    ap: float
    ap50: float
    boxes: int
    mask_ap: float | None = None
    mask_ap50: float | None = None


@dataclass(frozen=True)
class Score:
    """The metrics by name, those of every category, and the curves whose means they are.

    The names are METRICS and, if masks were predicted, MASK_METRICS; otherwise `mask_curves` is None.
    """

    metrics: dict[str, float]
    classes: tuple[ClassScore, ...]
    curves: Curves
    mask_curves: Curves | None = None


def coco_metrics(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in 0..1, or -1 if there is no such truth.

    If the detections have masks, also return mask_AP, ..., mask_ARl. `manifest` is the data set with the truth, `rows`
    the images to score (default: all). The best 100 detections per image and category count, as in pycocotools.

    Raise `ShardError` when a detection is not finite, or of an image or label that is not scored, and when masks are to
    be scored and a true object has no segmentation.
    """
    return score_detections(manifest, detections, rows=rows).metrics


def score_detections(
    manifest: Manifest, detections: Detections, *, rows: Ints | None = None, scorer: Scorer = "hotcoco"
) -> Score:
    """Return metrics, per-class AP and curves from one evaluation; arguments and errors as for `coco_metrics`.

    `scorer` is the library that counts; pycocotools is the reference, and takes minutes for thousands of images.
    """
    evaluate = _SCORERS[scorer]
    comparison = compare(manifest, detections, rows)
    boxes = evaluate(comparison, "bbox")
    metrics = dict(zip(METRICS, boxes.stats, strict=True))
    mask_precision = None
    if detections.masks is not None:
        masks = evaluate(comparison, "segm")
        metrics |= dict(zip(MASK_METRICS, masks.stats, strict=True))
        mask_precision = masks.precision
    return Score(
        metrics=metrics,
        classes=_class_scores(manifest, boxes.precision, mask_precision, comparison),
        curves=mean_curves(boxes.precision),
        mask_curves=None if mask_precision is None else mean_curves(mask_precision),
    )


def _class_scores(
    manifest: Manifest, precision: Precision, mask_precision: Precision | None, comparison: Comparison
) -> tuple[ClassScore, ...]:
    counted = comparison.truth["label"][comparison.truth["iscrowd"] == 0]
    counts = np.bincount(counted, minlength=manifest.num_classes)
    scores = []
    for label, category in enumerate(manifest.categories):
        ap, ap50 = _class_ap(precision, label)
        mask_ap, mask_ap50 = (None, None) if mask_precision is None else _class_ap(mask_precision, label)
        boxes = int(counts[label])
        scores.append(ClassScore(label, category.id, category.name, ap, ap50, boxes, mask_ap, mask_ap50))
    return tuple(scores)


def _class_ap(precision: Precision, label: int) -> tuple[float, float]:
    """Return AP and AP50 of all areas (index 0) and up to 100 detections per image (index -1)."""
    values = precision[:, :, label, 0, -1]
    return _mean_precision(values), _mean_precision(values[0])


def _mean_precision(values: Precision) -> float:
    """Return the mean of the precisions that are defined (not -1), or -1 if none is."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0
