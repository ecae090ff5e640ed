"""Panoptic quality (PQ) of a data set from the counts of its images, with COCO's figures, and its loss by kind of error.

Sums are rounded once, so that neither the order of images nor the number of ranks changes a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from shards.arrays import Mask
from shards.errors import ShardError
from shards.score.panoptic_counts import ImageCounts, Outcome, SegmentCounts, count, in_columns

__all__ = [
    "ClassQuality", "ErrorGains", "GroupQuality", "ImageCounts", "PanopticQuality", "SegmentCounts", "count", "in_columns",
    "quality", "quality_of",
]  # fmt: skip

LOW_OVERLAP = 0.1
"""IoU from which a missed and a false segment of the same class are a true one found with low quality."""


@dataclass(frozen=True)
class GroupQuality:
    """Mean PQ, SQ and RQ over the `n` classes that occur, in the truth or in predictions."""

    pq: float
    sq: float
    rq: float
    n: int


@dataclass(frozen=True)
class ClassQuality:
    """Counts of one class, from which its PQ, SQ and RQ follow; all of them are 0 if it never occurs.

    overlap: sum of the IoUs of pairs that match. matched, missed, false: COCO's TP, FN and FP.
    low_missed, low_false: those of the missed and of the false segments that overlap with one another by an IoU of at least
    0.1: found, but not well enough.
    """

    label: int
    overlap: float
    matched: int
    missed: int
    false: int
    low_missed: int = 0
    low_false: int = 0

    @property
    def occurs(self) -> bool:
        return self.matched + self.missed + self.false > 0

    @property
    def sq(self) -> float:
        return self.overlap / self.matched if self.matched else 0.0

    @property
    def rq(self) -> float:
        return self.matched / self._weight if self.occurs else 0.0

    @property
    def pq(self) -> float:
        return self.overlap / self._weight if self.occurs else 0.0

    @property
    def _weight(self) -> float:
        return self.matched + self.false / 2 + self.missed / 2


@dataclass(frozen=True)
class ErrorGains:
    """Gains of mean PQ if a kind of error never happened: which kind costs most.

    missed: true segments that nothing overlaps. false: predictions of nothing. low_quality: segments of the right class whose
    IoU is from 0.1 to 0.5. outlines: pairs that match, with an IoU below 1.
    """

    missed: float
    false: float
    low_quality: float
    outlines: float


@dataclass(frozen=True)
class PanopticQuality:
    """Quality of all classes, of things and of stuff, None if no class of a group occurs, and of each class by label.

    gains: None if the kinds of errors were not told apart.
    """

    all: GroupQuality | None
    things: GroupQuality | None
    stuff: GroupQuality | None
    classes: tuple[ClassQuality, ...]
    gains: ErrorGains | None = None


def quality(counts: Iterable[ImageCounts], things: Sequence[bool]) -> PanopticQuality:
    """Return the quality of the images behind `counts`, each given once; `things`: true for each label that is a thing.

    Raise `ShardError` for a label beyond `things`.
    """
    return quality_of(in_columns(list(counts)), things)


def quality_of(counts: SegmentCounts, things: Sequence[bool]) -> PanopticQuality:
    """Do the same as `quality` for columns."""
    labels, outcomes, overlaps = counts.labels, counts.outcomes, counts.overlaps
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(things):
        raise ShardError(
            f"got segments of label {labels.max()}, expected labels below {len(things)}, those of the data set"
        )
    matched, missed, false = (outcomes == outcome for outcome in Outcome)
    low = overlaps >= LOW_OVERLAP

    def per_class(chosen: Mask) -> list[int]:
        found: list[int] = np.bincount(labels[chosen], minlength=len(things)).tolist()
        return found

    order = np.flatnonzero(matched)[np.argsort(labels[matched], kind="stable")]
    by_class = np.split(overlaps[order], np.searchsorted(labels[order], np.arange(1, len(things))))
    columns = [per_class(chosen) for chosen in (matched, missed, false, missed & low, false & low)]
    classes = [
        ClassQuality(label, math.fsum(overlap.tolist()), *numbers)
        for label, (overlap, *numbers) in enumerate(zip(by_class, *columns, strict=True))
    ]
    return replace(of_classes(classes, things), gains=_gains(classes))


def of_classes(classes: Sequence[ClassQuality], things: Sequence[bool]) -> PanopticQuality:
    """Return the quality of classes in the order of their labels, without gains."""
    return PanopticQuality(
        all=_mean(classes),
        things=_mean([found for found in classes if things[found.label]]),
        stuff=_mean([found for found in classes if not things[found.label]]),
        classes=tuple(classes),
    )


def _mean(classes: Iterable[ClassQuality]) -> GroupQuality | None:
    occurring = [found for found in classes if found.occurs]
    if not occurring:
        return None
    pq, sq, rq = zip(*((found.pq, found.sq, found.rq) for found in occurring), strict=True)
    n = len(occurring)
    return GroupQuality(math.fsum(pq) / n, math.fsum(sq) / n, math.fsum(rq) / n, n)


def _gains(classes: Sequence[ClassQuality]) -> ErrorGains:
    """Return the gains over the same classes; one of which nothing is left is as good as can be."""
    occurring = [found for found in classes if found.occurs]
    pq = [found.pq for found in occurring]

    def gain(overlap: list[float], missed: list[int], false: list[int]) -> float:
        gains = [
            (o / (c.matched + m / 2 + f / 2) if c.matched + m + f else 1.0) - before
            for c, before, o, m, f in zip(occurring, pq, overlap, missed, false, strict=True)
        ]
        return math.fsum(gains) / len(gains) if gains else 0.0

    overlap = [c.overlap for c in occurring]
    missed, false = [c.missed for c in occurring], [c.false for c in occurring]
    low_missed, low_false = [c.low_missed for c in occurring], [c.low_false for c in occurring]
    return ErrorGains(
        missed=gain(overlap, low_missed, false),
        false=gain(overlap, missed, low_false),
        low_quality=gain(
            overlap,
            [m - low for m, low in zip(missed, low_missed, strict=True)],
            [f - low for f, low in zip(false, low_false, strict=True)],
        ),
        outlines=gain([float(c.matched) for c in occurring], missed, false),
    )
