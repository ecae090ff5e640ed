"""Difference in panoptic quality (PQ) of two models on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from shards.arrays import Floats, Ints, Mask
from shards.dataset.manifest import Manifest
from shards.errors import ShardError
from shards.score.difference.changes import DRAWS, Change, Difference, between, change
from shards.score.panoptic_counts import Outcome, SegmentCounts
from shards.score.panoptic_quality import GroupQuality, PanopticQuality, quality_of
from shards.score.resampled import draw, mean_quality, panoptic_qualities

_BYTES = 2**26  # of the weights of the draws that are counted at once


@dataclass(frozen=True, eq=False)
class _Run:
    """Quality of a run on all images, the figures in each draw by name, and PQ by class and draw."""

    quality: PanopticQuality
    drawn: dict[str, Floats]
    classes: Floats


def segment_difference(
    manifest: Manifest,
    before: Sequence[SegmentCounts],
    after: Sequence[SegmentCounts],
    images: int,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Return the difference in PQ between two sides on the same `images` images of panoptic data.

    A side is the counts of one run, or of several whose mean is compared.
    """
    if not before or not after:
        raise ShardError("got no segments of one of the sides to compare; expected those of a run at least")
    things = np.array([bool(category.isthing) for category in manifest.categories])
    sides = [[_run(counts, things, images, draws, seed) for counts in side] for side in (before, after)]
    objects, of_images = _true_segments(before[0], len(things))
    classes = [
        _class_change(category.name, label, sides, int(objects[label]), int(of_images[label]))
        for label, category in enumerate(manifest.categories)
    ]
    runs = [tuple(_value(run.quality, "PQ") for run in side) for side in sides]
    figures = [_figure_change(name, sides) for name in sides[0][0].drawn]
    return Difference(tuple(figures), tuple(classes), runs[0], runs[1], images, draws)


def _run(counts: SegmentCounts, things: Mask, images: int, draws: int, seed: int) -> _Run:
    rng = np.random.default_rng(seed)  # the same images for every run
    at_once = max(1, min(draws, _BYTES // (4 * max(images, 1))))
    chunks = [
        panoptic_qualities(counts, len(things), draw(images, min(at_once, draws - start), rng))
        for start in range(0, draws, at_once)
    ]
    pq, sq, rq = (np.hstack(columns) for columns in zip(*chunks, strict=True))
    groups = {"PQ": pq, "PQ_things": pq[things], "PQ_stuff": pq[~things], "SQ": sq, "RQ": rq}
    drawn = {name: mean_quality(values) for name, values in groups.items()}
    return _Run(quality_of(counts, things.tolist()), drawn, pq)


def _true_segments(counts: SegmentCounts, classes: int) -> tuple[Ints, Ints]:
    """Return the number of true segments of each class, and that of images with one."""
    true = counts.outcomes != Outcome.FALSE
    pairs = np.stack([counts.labels[true], counts.images[true]])
    of_images = np.bincount(np.unique(pairs, axis=1)[0], minlength=classes)
    return np.bincount(pairs[0], minlength=classes), of_images


def _figure_change(name: str, sides: Sequence[Sequence[_Run]]) -> Change:
    values = [fmean(_value(run.quality, name) for run in side) for side in sides]
    return change(name, values[0], values[1], between([[run.drawn[name] for run in side] for side in sides]))


def _value(quality: PanopticQuality, name: str) -> float:
    """Return a figure as an evaluation has it, -1 if no class of its group occurs."""
    figure, _, group = name.partition("_")
    found: GroupQuality | None = getattr(quality, group or "all")
    return -1.0 if found is None else float(getattr(found, figure.lower()))


def _class_change(name: str, label: int, sides: Sequence[Sequence[_Run]], objects: int, images: int) -> Change:
    values = [fmean(run.quality.classes[label].pq for run in side) if objects else -1.0 for side in sides]
    drawn = between([[run.classes[label] for run in side] for side in sides])
    return change(name, values[0], values[1], drawn, objects, images)
