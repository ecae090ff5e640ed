"""Matches of predicted with true segments of one image, by the rules of COCO's panoptic quality.

Only a row per segment is kept of an image, so counts of a whole data set are small and can be brought together from ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from shards.arrays import Floats, Ints
from shards.errors import ShardError
from shards.panoptic.segments import TrueSegments

_Labels = Sequence[int] | npt.NDArray[np.integer]


class Outcome(IntEnum):
    """Outcome of a segment: a pair that matches, a true segment without one, or a predicted one without."""

    MATCHED = 0
    MISSED = 1
    FALSE = 2


@dataclass(frozen=True, eq=False)
class ImageCounts:
    """Outcomes of one image: pairs that match, then true segments that were missed, then false ones.

    Crowds, and predictions mostly on VOID or on a crowd of their class, are in none of them.

    labels: int64 [M]. outcomes: int8 [M], values of `Outcome`.
    overlaps: float64 [M], IoU of the pair; of a missed or false segment the highest with a false or missed one of its class,
    0 without one.
    true, found: int64 [M], positions of the segments in the truth and in the prediction, -1 if there is none.
    """

    labels: Ints
    outcomes: npt.NDArray[np.int8]
    overlaps: Floats
    true: Ints
    found: Ints

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class SegmentCounts:
    """Outcomes of many images in columns, a row per segment.

    images: int64 [S], position of the segment's image. labels, outcomes, overlaps: as those of `ImageCounts`.
    """

    images: Ints
    labels: Ints
    outcomes: npt.NDArray[np.int8]
    overlaps: Floats

    def __len__(self) -> int:
        return len(self.labels)


def in_columns(counts: Sequence[ImageCounts]) -> SegmentCounts:
    """Return the outcomes of images, whose positions are those in `counts`."""
    return SegmentCounts(
        np.repeat(np.arange(len(counts)), [len(counted) for counted in counts]),
        np.concatenate([np.zeros(0, np.int64), *(counted.labels for counted in counts)]),
        np.concatenate([np.zeros(0, np.int8), *(counted.outcomes for counted in counts)]),
        np.concatenate([np.zeros(0), *(counted.overlaps for counted in counts)]),
    )


def count(truth: TrueSegments, indices: npt.NDArray[np.integer], labels: _Labels) -> ImageCounts:
    """Return the outcomes of a prediction for one image.

    indices: [height, width], the predicted segment of each pixel, -1 where there is none. labels: of each segment, labels of
    the manifest. Areas of predicted segments are counted, those of true ones are the JSON's, as in COCO's code.
    Raise `ShardError` for another size than the truth's, and for segments without pixels or without a label.
    """
    found_labels = np.asarray(labels, np.int64)
    shared = _intersections(truth, indices, len(found_labels))
    crossed, void, areas = shared[:-2], shared[-2], shared.sum(axis=0)
    if not areas.all():
        raise ShardError(f"got predicted segment {int(areas.argmin())} without pixels; expected at least one of each")
    same = (truth.labels[:, None] == found_labels) & ~truth.crowds[:, None]
    # At least one pixel, since the JSON's area can be anything.
    union = np.maximum(truth.areas[:, None] + areas - crossed - void, 1)
    overlap = np.where(same, crossed / union, 0.0)
    matches = overlap > 0.5
    matched_true, matched_found = np.nonzero(matches)
    missed = np.flatnonzero(~truth.crowds & ~matches.any(axis=1))
    ignored = (void + _on_crowd_of_class(truth, found_labels, crossed)) / areas > 0.5
    false = np.flatnonzero(~matches.any(axis=0) & ~ignored)
    near = overlap[np.ix_(missed, false)]
    return ImageCounts(
        np.concatenate([truth.labels[matched_true], truth.labels[missed], found_labels[false]]),
        np.repeat(np.array(list(Outcome), np.int8), [len(matched_true), len(missed), len(false)]),
        np.concatenate([overlap[matches], near.max(axis=1, initial=0.0), near.max(axis=0, initial=0.0)]),
        np.concatenate([matched_true, missed, np.full(len(false), -1)]),
        np.concatenate([matched_found, np.full(len(missed), -1), false]),
    )


def _intersections(truth: TrueSegments, indices: npt.NDArray[np.integer], found: int) -> Ints:
    """Return the pixels of each of the M predicted segments on each true one, int64 [N + 2, M].

    The last two rows are those on VOID, and those on ids that the truth does not list, which are neither.
    """
    if indices.shape != truth.ids.shape:
        raise ShardError(f"got a prediction of {indices.shape} pixels, expected {truth.ids.shape}, those of the truth")
    ids, places = truth.ids.reshape(-1), indices.reshape(-1)
    # Pixels are joined into runs first, of which there are a hundred times fewer.
    begins = np.ones(len(ids), np.bool_)
    np.not_equal(ids[1:], ids[:-1], out=begins[1:])
    begins[1:] |= places[1:] != places[:-1]
    starts = np.flatnonzero(begins)
    lengths, ids, places = np.diff(starts, append=len(begins)), ids[starts], places[starts].astype(np.int64)
    if len(places) and not -1 <= places.min() <= places.max() < found:
        raise ShardError(f"got segment {places.max()} in a prediction of {found} segments; expected a label of each")
    listed = len(truth.segment_ids)
    order = np.argsort(truth.segment_ids, kind="stable")
    at = order[np.minimum(np.searchsorted(truth.segment_ids, ids, sorter=order), listed - 1)] if listed else ids
    known = truth.segment_ids[at] == ids if listed else np.zeros(len(ids), np.bool_)
    rows = np.where(ids == 0, listed, np.where(known, at, listed + 1)).astype(np.int64)
    cells = np.bincount(rows * (found + 1) + places + 1, lengths, minlength=(listed + 2) * (found + 1))
    return cells.astype(np.int64).reshape(listed + 2, found + 1)[:, 1:]


def _on_crowd_of_class(truth: TrueSegments, found_labels: Ints, crossed: Ints) -> Ints:
    """Return the pixels of each prediction on the crowd of its class: of several crowds the last, as in COCO's code."""
    last = {int(truth.labels[crowd]): int(crowd) for crowd in np.flatnonzero(truth.crowds)}
    pixels = [crossed[last[label], place] if label in last else 0 for place, label in enumerate(found_labels.tolist())]
    return np.array(pixels, np.int64)
