"""Matches of detections with true objects at each of COCO's ten IoU thresholds, in columns.

They are what AP is counted from, so AP on other images drawn from the same data set needs no matching again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.arrays import Floats, Ints
from shards.score.comparison import Comparison
from shards.score.overlaps import iou

Bools = npt.NDArray[np.bool_]
THRESHOLDS = np.linspace(0.5, 0.95, 10)
SIZES = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""COCO's sizes of objects: lowest and highest area in pixels."""
_MOST = 100  # detections per image and class


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections in the order in which COCO counts them: by label, then by descending score.

    labels, images: int64 [M]; an image is known by its position in the comparison.
    hit: bool [M, 10], matched with an object of the size.
    false: bool [M, 10], counted as a false one; the others are ignored, as in crowds or of other sizes.
    objects: int64 [I, K], objects of the size, by image and label, without crowds.
    """

    labels: Ints
    images: Ints
    hit: Bools
    false: Bools
    objects: Ints


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Detections that count, in their order, and their pairs with objects of their image and class that may match."""

    labels: Ints
    images: Ints
    areas: Floats
    detection: Ints
    truth: Ints
    overlap: Floats


def match(comparison: Comparison, sizes: Iterable[str] = ("all",)) -> dict[str, Matches]:
    """Return the matches of boxes with the objects of each size, as pycocotools makes them."""
    candidates = _candidates(comparison)
    return {size: _match(comparison, candidates, *SIZES[size]) for size in sizes}


def _match(comparison: Comparison, candidates: _Candidates, low: float, high: float) -> Matches:
    truth, classes = comparison.truth, comparison.classes
    ignored = (truth["iscrowd"] != 0) | (truth["area"] < low) | (truth["area"] > high)
    counted = comparison.truth_images[~ignored] * classes + truth["label"][~ignored]
    objects = np.bincount(counted, minlength=len(comparison.rows) * classes).reshape(-1, classes)
    found, of_ignored = _assign(comparison, candidates, ignored)
    elsewhere = (candidates.areas < low) | (candidates.areas > high)
    false = ~found & ~elsewhere[:, None]
    return Matches(candidates.labels, candidates.images, found & ~of_ignored, false, objects)


def _counted(comparison: Comparison) -> Ints:
    """Return the detections that count, the best ones of each image and class, by label and descending score."""
    detections, images = comparison.detections, comparison.detection_images
    within = np.lexsort((-detections.scores, images, detections.labels))  # stable, as pycocotools' sorts are
    groups = detections.labels[within] * len(comparison.rows) + images[within]
    kept = within[_rank_in_group(groups) < _MOST]
    return np.asarray(kept[np.lexsort((-detections.scores[kept], detections.labels[kept]))], np.int64)


def _rank_in_group(groups: Ints) -> Ints:
    """Return the number of earlier entries with the same value; equal values are next to each other."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]]) if len(groups) else np.zeros(0, np.int64)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.r_[starts, len(groups)]))


def _assign(comparison: Comparison, candidates: _Candidates, ignored: Bools) -> tuple[Bools, Bools]:
    """Return which detections are matched, and which of them with an ignored object, both bool [M, 10].

    The detections of an image and class choose one after the other, the best score first. All images choose at once, so
    there are as many rounds as detections that touch an object of one image and class.
    """
    labels, images = candidates.labels, candidates.images
    detection, true, overlap = candidates.detection, candidates.truth, candidates.overlap
    # The first choice of a detection comes first: counted objects, the highest overlap, and of equal ones the last.
    order = np.lexsort((-true, -overlap, ignored[true], detection))
    detection, true, overlap = detection[order], true[order], overlap[order]
    found, of_ignored = np.zeros((len(labels), 10), np.bool_), np.zeros((len(labels), 10), np.bool_)
    taken, crowd = np.zeros((len(ignored), 10), np.bool_), comparison.truth["iscrowd"] != 0
    firsts = np.flatnonzero(np.r_[True, detection[1:] != detection[:-1]]) if len(detection) else detection
    ends = np.r_[firsts[1:], len(detection)]
    touching = detection[firsts]
    groups = labels[touching] * len(comparison.rows) + images[touching]
    by_group = np.argsort(groups, kind="stable")
    rounds = np.empty(len(groups), np.int64)
    rounds[by_group] = _rank_in_group(groups[by_group])
    by_round = np.argsort(rounds, kind="stable")
    for chosen in np.split(by_round, np.flatnonzero(np.diff(rounds[by_round])) + 1):
        if not len(chosen):
            continue
        counts = ends[chosen] - firsts[chosen]
        starts = np.cumsum(counts) - counts
        at = np.repeat(firsts[chosen] - starts, counts) + np.arange(int(counts.sum()))
        free = ~taken[true[at]] | crowd[true[at]][:, None]
        fits = free & (overlap[at][:, None] >= np.minimum(THRESHOLDS, 1 - 1e-10))
        choice = np.minimum.reduceat(np.where(fits, at[:, None], len(detection)), starts, axis=0)
        which, threshold = np.nonzero(choice < len(detection))
        objects = true[choice[which, threshold]]
        taken[objects, threshold] = True
        found[touching[chosen[which]], threshold] = True
        of_ignored[touching[chosen[which]], threshold] = ignored[objects]
    return found, of_ignored


def _candidates(comparison: Comparison) -> _Candidates:
    order = _counted(comparison)
    labels, images = comparison.detections.labels[order], comparison.detection_images[order]
    boxes = comparison.detections.boxes_xywh[order]
    truth, classes = comparison.truth, comparison.classes
    keys = comparison.truth_images * classes + truth["label"]
    by_key = np.argsort(keys, kind="stable")
    wanted = images * classes + labels
    first = np.searchsorted(keys[by_key], wanted)
    counts = np.searchsorted(keys[by_key], wanted, side="right") - first
    detection = np.repeat(np.arange(len(labels)), counts)
    true = by_key[np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(int(counts.sum()))]
    overlap = iou(boxes[detection], truth["bbox"][true], truth["iscrowd"][true] != 0)
    near = overlap >= THRESHOLDS[0]
    return _Candidates(
        labels, images, np.asarray(boxes[:, 2:].prod(axis=1)), detection[near], true[near], overlap[near]
    )
