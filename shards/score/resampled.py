"""AP and PQ on images drawn again with replacement, from matches that are made once.

AP is no mean over images, so each draw needs its own curves. A draw is a weight per image, the number of times that it
was drawn, and the curves are sums of weights in the order of the scores: no draw is sorted or matched again. PQ is made
of sums per class, so those of all draws are one product of matrices.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from shards.arrays import Floats
from shards.score.matches import Matches
from shards.score.panoptic_counts import Outcome, SegmentCounts

Weights = npt.NDArray[np.float32]
_RECALLS = np.linspace(0, 1, 101)
_ABOVE = np.arange(101) / 100 < _RECALLS
"""Recalls that COCO's table has a rounding error above: a recall of exactly 0.35 does not reach its 0.35."""


def draw(images: int, count: int, rng: np.random.Generator) -> Weights:
    """Return `count` draws of as many images as there are, with replacement: float32 [images, count]."""
    weights = np.empty((images, count), np.float32)
    for number in range(count):
        weights[:, number] = np.bincount(rng.integers(0, images, images), minlength=images)
    return weights


def average_precisions(matches: Matches, weights: Weights) -> Floats:
    """Return AP by IoU threshold, class and draw, float64 [10, K, draws]; NaN where a draw has no object of the class."""
    classes = matches.objects.shape[1]
    objects = matches.objects.T.astype(np.float32) @ weights  # exact: far fewer than 2 ** 24
    ends = np.searchsorted(matches.labels, np.arange(classes + 1))
    found = np.full((10, classes, weights.shape[1]), np.nan)
    for label in np.flatnonzero(matches.objects.any(axis=0)).tolist():
        chosen = slice(int(ends[label]), int(ends[label + 1]))
        columns = (matches.images[chosen], matches.hit[chosen], matches.false[chosen])
        found[:, label] = _class_precisions(*columns, objects[label], weights)
    return found


def mean_ap(precisions: Floats) -> Floats:
    """Return the mean over thresholds and classes in each draw; NaN without any object."""
    defined = ~np.isnan(precisions)
    counts = defined.sum(axis=(0, 1))
    sums = np.where(defined, precisions, 0).sum(axis=(0, 1))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def panoptic_qualities(counts: SegmentCounts, classes: int, weights: Weights) -> tuple[Floats, Floats, Floats]:
    """Return PQ, SQ and RQ by class and draw, float64 [K, draws] each; NaN where a draw has no segment of the class."""
    paired = counts.outcomes == Outcome.MATCHED

    def sums(chosen: npt.NDArray[np.bool_], values: Floats) -> Floats:
        cells = (values[chosen], (counts.labels[chosen], counts.images[chosen]))
        return np.asarray(csr_array(cells, shape=(classes, len(weights))) @ weights, np.float64)

    ones = np.ones(len(counts))
    matched, overlaps = sums(paired, ones), sums(paired, counts.overlaps)
    total = matched + sums(~paired, ones) / 2
    found = total > 0
    least = np.maximum(total, 0.5)
    values = (overlaps / least, overlaps / np.maximum(matched, 1), matched / least)
    pq, sq, rq = (np.where(found, value, np.nan) for value in values)
    return pq, sq, rq


def mean_quality(qualities: Floats) -> Floats:
    """Return the mean over the classes that occur in each draw; NaN if none does."""
    return mean_ap(qualities[None])


def _class_precisions(
    images: npt.NDArray[np.int64],
    hit: npt.NDArray[np.bool_],
    false: npt.NDArray[np.bool_],
    objects: Weights,
    weights: Weights,
) -> Floats:
    """Return AP of a class by threshold and draw, [10, draws]; see `average_precisions`.

    Only hits raise the recall, so precision matters at them alone. Detections that are false at every threshold, nearly
    all of them, are summed between hits at once; the others have a row of weights each.
    """
    always = np.asarray(false.all(axis=1), np.bool_)
    own = np.flatnonzero(~always & (hit | false).any(axis=1))
    rows = weights[images[own]]
    before = _falses_before(images, always, own, weights)
    found = np.full((10, weights.shape[1]), np.nan)
    defined = objects > 0
    for threshold in range(10):
        hits = np.flatnonzero(hit[own, threshold])
        true = _running_sums(rows[hits])
        counted = np.flatnonzero(false[own, threshold])
        wrong = before[hits] + _sums_before(rows, counted, hits)
        precision = true / np.maximum(true + wrong, 1)
        for row in range(len(hits) - 2, -1, -1):  # the highest precision at this recall or a higher one
            np.maximum(precision[row], precision[row + 1], out=precision[row])
        reached = _recalls_reached(true, np.maximum(objects, 1))
        reached[1:] -= reached[:-1].copy()
        sums = np.einsum("ij,ij->j", reached, precision, dtype=np.float64) / len(_RECALLS)
        found[threshold, defined] = sums[defined]
    return found


def _falses_before(
    images: npt.NDArray[np.int64], always: npt.NDArray[np.bool_], own: npt.NDArray[np.int64], weights: Weights
) -> Weights:
    """Return for each of `own` the summed weights of the detections before it that are false at every threshold."""
    at = np.flatnonzero(always)
    segments = np.searchsorted(own, at)
    at, segments = at[segments < len(own)], segments[segments < len(own)]  # after the last of `own` nothing counts
    pointers = np.searchsorted(segments, np.arange(len(own) + 1))
    shape = (len(own), len(weights))
    between = csr_array((np.ones(len(at), np.float32), images[at], pointers), shape=shape)
    return _running_sums(np.asarray(between @ weights, np.float32))


def _sums_before(rows: Weights, counted: npt.NDArray[np.int64], at: npt.NDArray[np.int64]) -> Weights:
    """Return the sums of the rows `counted` that lie before each position of `at`."""
    sums = np.concatenate([np.zeros((1, rows.shape[1]), np.float32), _running_sums(rows[counted])])
    return np.asarray(sums[np.searchsorted(counted, at)], np.float32)


def _running_sums(rows: Weights) -> Weights:
    """Sum rows downwards, in place: faster than numpy's `cumsum`, which goes column by column."""
    for row in range(1, len(rows)):
        np.add(rows[row], rows[row - 1], out=rows[row])
    return rows


def _recalls_reached(true: Weights, objects: Weights) -> Weights:
    """Return how many of COCO's 101 recalls so many hits reach."""
    share = np.float32(100) * true / objects
    reached = np.floor(share)
    exact = share == reached
    exact[exact] = _ABOVE[reached[exact].astype(np.int64)]
    return np.asarray(reached + 1 - exact, np.float32)
