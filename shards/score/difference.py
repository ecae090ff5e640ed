"""Difference in AP of two models on the same images, with an interval from images drawn again (paired bootstrap).

The images of a data set are one draw of many that it could have been. Both models are scored again and again on images
drawn from it with replacement, the same ones for both, so an image that is hard for both weighs on neither.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

import numpy as np

from shards.arrays import Floats, Ints
from shards.dataset.manifest import Manifest
from shards.errors import ShardError
from shards.score.coco_eval import Score, score_detections
from shards.score.comparison import Comparison, compare
from shards.score.detections import Detections
from shards.score.matches import SIZES, match
from shards.score.resampled import average_precisions, draw, mean_ap

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
DRAWS = 1000
LEAST_IMAGES = 20
"""Images with a class's objects below which its interval says nothing: one image drawn again and again never differs."""
_OF_SIZE = {"small": "APs", "medium": "APm", "large": "APl"}
_INTERVAL = (0.025, 0.975)
_BYTES = 2**26  # of the weights of the draws that are counted at once


@dataclass(frozen=True)
class Change:
    """Value of a figure for both sides, the mean over the runs of a side, and the interval of the difference.

    Values are -1 without truth, and the interval is 0 to 0 then.
    """

    name: str
    before: float
    after: float
    low: float
    """Lower end of the 95% interval of the difference."""
    high: float
    objects: int = 0
    """Number of true objects, for a class."""
    images: int | None = None
    """Number of images that these objects are in, for a class."""

    @property
    def is_rare(self) -> bool:
        """True for a class in so few images that its interval says nothing."""
        return self.images is not None and self.images < LEAST_IMAGES

    @property
    def difference(self) -> float:
        """Value of the second side minus that of the first."""
        return self.after - self.before

    @property
    def is_chance(self) -> bool:
        """True if the interval holds 0: other images could reverse the order of the sides."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Difference:
    """Figures of boxes for two sides, each of one run or of several."""

    figures: tuple[Change, ...]
    """Changes of FIGURES, in that order; without sizes of the first three."""
    classes: tuple[Change, ...]
    """AP of the categories, in the order of their labels."""
    before_runs: tuple[float, ...]
    """AP of each run of the first side."""
    after_runs: tuple[float, ...]
    images: int
    draws: int

    @property
    def ap(self) -> Change:
        """The change in AP."""
        return self.figures[0]


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation between runs; 0 of a single one."""
    return stdev(values) if len(values) > 1 else 0.0


def interval_of_recipes(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95% interval of the difference between two recipes from runs of each (Welch); None from fewer than two.

    It holds for runs with other seeds on the same images; the interval of the draws holds for these runs on other images.
    """
    if min(len(before), len(after)) < 2:
        return None
    from scipy.stats import ttest_ind

    if spread(before) == spread(after) == 0:
        return (fmean(after) - fmean(before),) * 2
    found = ttest_ind(after, before, equal_var=False).confidence_interval(0.95)
    return float(found.low), float(found.high)


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
    figures = tuple(_change(name, values[0][name], values[1][name], drawn[name]) for name in drawn)
    images = _images_by_class(comparisons[0][0])
    classes = tuple(
        _change(
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


def _change(
    name: str, before: float, after: float, drawn: Floats, objects: int = 0, images: int | None = None
) -> Change:
    defined = drawn[~np.isnan(drawn)]
    low, high = np.quantile(defined, _INTERVAL).tolist() if len(defined) else (0.0, 0.0)
    return Change(name, before, after, low, high, objects, images)


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
        name: _between([[mean_ap(run[chosen]) for run in side] for side in of_all])
        for name, chosen in thresholds.items()
    }
    figures |= {
        name: _between([[mean_ap(run) for run in side] for side in counted[size]])
        for size, name in _OF_SIZE.items()
        if size in counted
    }
    return figures, _between([[run.mean(axis=0) for run in side] for side in of_all])


def _between(sides: Sequence[Sequence[Floats]]) -> Floats:
    """Return the mean over the runs of the second side minus that of the first."""
    before, after = (np.mean(side, axis=0) for side in sides)
    return np.asarray(after - before, np.float64)
