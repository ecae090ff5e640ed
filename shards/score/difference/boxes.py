"""Difference in AP of two models on the same images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import fmean

import numpy as np

from shards.arrays import Floats, Ints
from shards.dataset.manifest import Manifest
from shards.errors import ShardError
from shards.score.coco_eval import Score, score_detections
from shards.score.comparison import Comparison, compare
from shards.score.detections import Detections
from shards.score.difference.changes import DRAWS, Difference, between, change
from shards.score.matches import SIZES, match
from shards.score.resampled import average_precisions, draw, mean_ap

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_OF_SIZE = {"small": "APs", "medium": "APm", "large": "APl"}
_BYTES = 2**26  # of the weights of the draws that are counted at once


def difference(
    manifest: Manifest,
    before: Sequence[Detections],
    after: Sequence[Detections],
    *,
    rows: Ints | None = None,
    draws: int = DRAWS,
    sizes: bool = True,
    seed: int = 0,
) -> Difference:
    """Return the difference in AP of boxes between two sides on the same images; raise as `coco_metrics`.

    A side is the detections of one run, or of several whose mean is compared. Without `sizes`, in a third of the time,
    there are no intervals of the figures by size.
    """
    if not before or not after:
        raise ShardError("got no detections for one of the sides to compare; expected those of a run at least")
    sides = [[_without_masks(found) for found in side] for side in (before, after)]
    scores = [[score_detections(manifest, found, rows=rows) for found in side] for side in sides]
    comparisons = [[compare(manifest, found, rows, masks=False) for found in side] for side in sides]
    drawn, drawn_classes = _drawn(comparisons, draws, tuple(SIZES) if sizes else ("all",), seed)
    values = [{name: fmean(score.metrics[name] for score in side) for name in FIGURES} for side in scores]
    figures = tuple(change(name, values[0][name], values[1][name], drawn[name]) for name in drawn)
    images = _images_by_class(comparisons[0][0])
    classes = tuple(
        change(
            category.name,
            _class_ap(scores[0], label),
            _class_ap(scores[1], label),
            drawn_classes[label],
            scores[0][0].classes[label].boxes,
            images[label],
        )
        for label, category in enumerate(manifest.categories)
    )
    runs = [tuple(score.metrics["AP"] for score in side) for side in scores]
    return Difference(figures, classes, runs[0], runs[1], len(comparisons[0][0].rows), draws)


def _without_masks(found: Detections) -> Detections:
    return Detections(found.image_ids, found.labels, found.scores, found.boxes_xywh)


def _class_ap(side: Sequence[Score], label: int) -> float:
    return fmean(score.classes[label].ap for score in side)


def _images_by_class(comparison: Comparison) -> list[int]:
    """Return the number of images with an object of each class."""
    counted = comparison.truth["iscrowd"] == 0
    pairs = np.unique(np.stack([comparison.truth["label"][counted], comparison.truth_images[counted]]), axis=1)
    return [int(count) for count in np.bincount(pairs[0], minlength=comparison.classes)]


def _drawn(
    comparisons: Sequence[Sequence[Comparison]], draws: int, sizes: Sequence[str], seed: int
) -> tuple[dict[str, Floats], Floats]:
    """Return the differences of each figure in each draw, and those of AP by class and draw; NaN without truth."""
    rng = np.random.default_rng(seed)
    images = len(comparisons[0][0].rows)
    at_once = max(1, min(draws, _BYTES // (4 * max(images, 1))))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [list(pool.map(partial(match, sizes=sizes), side)) for side in comparisons]
        matched = {size: [[run[size] for run in side] for side in found] for size in sizes}
        chunks = []
        for start in range(0, draws, at_once):
            weights = draw(images, min(at_once, draws - start), rng)
            tasks = {
                size: [[pool.submit(average_precisions, run, weights) for run in side] for side in sides]
                for size, sides in matched.items()
            }
            chunks.append(
                _differences(
                    {size: [[run.result() for run in side] for side in sides] for size, sides in tasks.items()}
                )
            )
    figures, classes = zip(*chunks, strict=True)
    return {name: np.concatenate([chunk[name] for chunk in figures]) for name in figures[0]}, np.hstack(classes)


def _differences(counted: Mapping[str, Sequence[Sequence[Floats]]]) -> tuple[dict[str, Floats], Floats]:
    """Return the same as `_drawn` for some draws; `counted` are the precisions by size, side and run."""
    thresholds = {"AP": slice(None), "AP50": slice(0, 1), "AP75": slice(5, 6)}
    of_all = counted["all"]
    figures = {
        name: between([[mean_ap(run[chosen]) for run in side] for side in of_all])
        for name, chosen in thresholds.items()
    }
    figures |= {
        name: between([[mean_ap(run) for run in side] for side in counted[size]])
        for size, name in _OF_SIZE.items()
        if size in counted
    }
    return figures, between([[run.mean(axis=0) for run in side] for side in of_all])
