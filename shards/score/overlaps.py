"""Overlaps of detections with the true objects of their image, and the matches that count as found.

These are for explanations; the metrics come from the scorers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.arrays import Floats, Ints
from shards.score.comparison import Comparison

FOUND_IOU = 0.5
"""IoU from which an object of the same class counts as found."""
LEAST_SCORE = 0.3
"""Lowest score of a detection that says anything about an image or a label."""


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Every pair of a detection and a true object of one image, also those that do not touch.

    detection, truth: int64 [P], positions in the comparison's detections and true objects.
    iou: float64 [P]; for a crowd the share of the detection that lies in it, as COCO counts.
    same: bool [P], whether both have the same label.
    crowd: bool [P].
    """

    detection: Ints
    truth: Ints
    iou: Floats
    same: npt.NDArray[np.bool_]
    crowd: npt.NDArray[np.bool_]

    def take(self, chosen: Ints | npt.NDArray[np.bool_]) -> Overlaps:
        """Return the pairs at `chosen`, positions or a mask."""
        return Overlaps(*(column[chosen] for column in vars(self).values()))


def overlaps(comparison: Comparison) -> Overlaps:
    """Return the pairs of all detections with at least `LEAST_SCORE`."""
    detections, truth = comparison.detections, comparison.truth
    by_image = np.argsort(comparison.truth_images, kind="stable")
    ends = np.searchsorted(comparison.truth_images[by_image], np.arange(len(comparison.rows) + 1))
    chosen = np.flatnonzero(detections.scores >= LEAST_SCORE)
    images = comparison.detection_images[chosen]
    counts = ends[images + 1] - ends[images]
    first = np.repeat(ends[images] - (np.cumsum(counts) - counts), counts)
    detection, objects = np.repeat(chosen, counts), by_image[first + np.arange(int(counts.sum()))]
    crowd = truth["iscrowd"][objects] != 0
    overlap = iou(detections.boxes_xywh[detection], truth["bbox"][objects], crowd)
    return Overlaps(detection, objects, overlap, detections.labels[detection] == truth["label"][objects], crowd)


def iou(found: Floats, true: Floats, crowd: npt.NDArray[np.bool_]) -> Floats:
    """Return the overlap of boxes in xywh, row by row; with a crowd the share of the found box that lies in it."""
    low = np.maximum(found[:, :2], true[:, :2])
    high = np.minimum(found[:, :2] + found[:, 2:], true[:, :2] + true[:, 2:])
    both = np.maximum(high - low, 0).prod(axis=1)
    area = found[:, 2:].prod(axis=1)
    whole = np.where(crowd, area, area + true[:, 2:].prod(axis=1) - both)
    return np.asarray(np.divide(both, whole, out=np.zeros_like(both), where=whole > 0), np.float64)


def found_objects(comparison: Comparison, pairs: Overlaps) -> Overlaps:
    """Return the pairs that count as found: the best free object of its class for each detection, best score first."""
    candidates = np.flatnonzero(pairs.same & ~pairs.crowd & (pairs.iou >= FOUND_IOU))
    return pairs.take(assign(candidates, pairs, pairs.iou, comparison.detections.scores))


def assign(candidates: Ints, pairs: Overlaps, values: Floats, scores: npt.NDArray[np.float32] | None = None) -> Ints:
    """Return candidates so that no detection and no object is in two of them, the highest value first.

    With `scores` the highest score is first and values decide between the objects of one detection.
    """
    keys: list[npt.NDArray[Any]] = [-values[candidates]]
    if scores is not None:
        keys += [pairs.detection[candidates], -scores[pairs.detection[candidates]]]
    ordered = candidates[np.lexsort(keys)]
    detections, objects, chosen = set[int](), set[int](), []
    columns = (ordered, pairs.detection[ordered], pairs.truth[ordered])
    for number, detection, true in zip(*(column.tolist() for column in columns), strict=True):
        if detection not in detections and true not in objects:
            detections.add(detection)
            objects.add(true)
            chosen.append(number)
    return np.array(chosen, np.int64)
