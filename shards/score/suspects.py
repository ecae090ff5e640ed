"""Labels that a model contradicts with confidence, most suspicious first: what a person should look at.

Four kinds: an object found with another class, found elsewhere, found where no label is, and a label where nothing is
found. A suspicion is in 0..1: how sure the model is of what it says instead, less as it also says what the label says.
It is not a probability; for a model that has not learned the data well, most suspects are errors of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.arrays import Floats, Ints
from shards.dataset.manifest import Manifest
from shards.score.comparison import Comparison, shard_name
from shards.score.overlaps import FOUND_IOU, LEAST_SCORE, Overlaps, assign, iou

Kind = Literal["class", "box", "missing", "spurious"]
_TOUCH_IOU = 0.1  # TIDE's bound between background and a bad box
_NEAR = 1.0  # distance of centres, in diagonals of the true box
_SIZES = (32**2, 96**2)  # COCO's small, medium and large
_WRONG_LABELS = 0.05  # share of labels that may be wrong; errors that a model makes more often are rather its own


@dataclass(frozen=True)
class Suspect:
    """A label that may be wrong, or an object that may lack one."""

    kind: Kind
    """class: another class; box: another box; missing: an object without a label; spurious: a label without an object."""
    suspicion: float
    image_id: int
    shard: str
    """File of the image."""
    annotation_id: int | None
    """None for an object without a label."""
    label: int | None
    """Label as it is."""
    box_xywh: tuple[float, float, float, float] | None
    found_label: int | None
    """Label that the model gives; None if it finds nothing."""
    found_box_xywh: tuple[float, float, float, float] | None
    score: float | None


def find_suspects(
    manifest: Manifest, comparison: Comparison, pairs: Overlaps, found: Overlaps, count: int
) -> tuple[Suspect, ...]:
    """Return the `count` most suspicious labels and missing labels; `found` are the found objects of `pairs`."""
    scores, truth = comparison.detections.scores.astype(np.float64), comparison.truth
    typical = float(np.median(found.iou)) if len(found.iou) else 1.0
    free_detections, free_objects = scores >= LEAST_SCORE, truth["iscrowd"] == 0
    free_objects[found.truth] = False
    # A second detection of a found object is a duplicate, and one in a crowd of its class is of the crowd: neither
    # contradicts a label, unless it lies closer to an object that is not found.
    covering = pairs.take(pairs.same & (pairs.iou >= FOUND_IOU))
    unfound = pairs.take(free_objects[pairs.truth])
    nearest = _highest(unfound.detection, unfound.iou, len(scores))
    overlap = np.where(covering.crowd, FOUND_IOU, covering.iou)  # a share of a crowd is no IoU
    free_detections[covering.detection[overlap >= nearest[covering.detection]]] = False
    free_detections[found.detection] = False
    free = pairs.take(free_detections[pairs.detection] & free_objects[pairs.truth])
    moved = _distance(free.iou, typical) * _near(comparison, free)
    values = np.where(free.same, moved, np.minimum(free.iou / typical, 1)) * scores[free.detection]
    chosen = assign(np.flatnonzero((free.same & (moved > 0)) | (~free.same & (free.iou >= FOUND_IOU))), free, values)
    values, paired = values[chosen], free.take(chosen)
    free_detections[paired.detection] = False
    free_objects[paired.truth] = False
    lone, unseen = np.flatnonzero(free_detections), np.flatnonzero(free_objects)
    # Overlap with any label, right or wrong, makes it less likely that one is missing.
    covered = _highest(pairs.detection, pairs.iou, len(scores))[lone]
    seen = _highest(pairs.truth, pairs.iou * scores[pairs.detection], len(truth))[unseen]
    off = np.concatenate([_distance(found.iou, typical) * scores[found.detection], values[paired.same]])
    off_detections = np.concatenate([found.detection, paired.detection[paired.same]])
    off_objects = np.concatenate([found.truth, paired.truth[paired.same]])
    other = paired.take(~paired.same)
    candidates = [
        _Candidates("box", off * _oddity(_rank_shares(off, len(off))), off_detections, off_objects),
        _Candidates(
            "class", values[~paired.same] * _oddity(_confusion_shares(comparison, other)), other.detection, other.truth
        ),
        _Candidates(
            "missing",
            scores[lone] * (1 - covered) * _oddity(_rank_shares(scores[lone], int((scores >= LEAST_SCORE).sum()))),
            lone,
            np.full(len(lone), -1),
        ),
        _Candidates(
            "spurious", (1 - seen) * _oddity(_missed_shares(comparison, unseen)), np.full(len(unseen), -1), unseen
        ),
    ]
    return tuple(_most_suspicious(manifest, comparison, candidates, count))


class _Candidates(NamedTuple):
    """Candidates of one kind: suspicions, detections and objects; -1 for none."""

    kind: Kind
    values: Floats
    detections: Ints
    objects: Ints


def _distance(iou: Floats, typical: float) -> Floats:
    """Return how far boxes are from the typical IoU of a found object, in 0..1."""
    span = max(typical - _TOUCH_IOU, 1e-6)
    return np.clip((typical - iou) / span, 0, 1)


def _near(comparison: Comparison, pairs: Overlaps) -> npt.NDArray[np.bool_]:
    """Return whether a detection is near an object and of a similar size, so that the one may be the other, moved."""
    found, true = comparison.detections.boxes_xywh[pairs.detection], comparison.truth["bbox"][pairs.truth]
    between = np.hypot(*((found - true)[:, :2] + (found - true)[:, 2:] / 2).T)
    areas, true_areas = found[:, 2:].prod(axis=1), true[:, 2:].prod(axis=1)
    similar = (areas <= 2 * true_areas) & (true_areas <= 2 * areas)
    return np.asarray(similar & (between <= _NEAR * np.hypot(true[:, 2], true[:, 3])), np.bool_)


def _highest(keys: Ints, values: Floats, count: int) -> Floats:
    highest = np.zeros(count)
    np.maximum.at(highest, keys, values)
    return np.minimum(highest, 1)


def _oddity(shares: Floats) -> Floats:
    """Return 1 for what the model does nowhere else, less the more often it does the same: then the model errs."""
    return _WRONG_LABELS / (_WRONG_LABELS + shares)


def _rank_shares(values: Floats, count: int) -> Floats:
    """Return for each value how many are higher, as a share of `count`."""
    ranks = np.empty(len(values))
    ranks[np.argsort(-values, kind="stable")] = np.arange(len(values))
    return ranks / max(count, 1)


def _confusion_shares(comparison: Comparison, pairs: Overlaps) -> Floats:
    """Return how often else an object of that label is found as that other class, as a share of such objects."""
    true, found = comparison.truth["label"][pairs.truth].astype(np.int64), comparison.detections.labels[pairs.detection]
    _, kinds, counts = np.unique(true * comparison.classes + found, return_inverse=True, return_counts=True)
    objects = np.bincount(comparison.truth["label"], minlength=comparison.classes)
    return np.asarray((counts[kinds] - 1) / np.maximum(objects[true], 1), np.float64)


def _missed_shares(comparison: Comparison, missed: Ints) -> Floats:
    """Return how many other objects of that size are missed, as a share of such objects."""
    sizes = np.digitize(comparison.truth["area"], _SIZES)
    listed, others = np.bincount(sizes, minlength=3), np.bincount(sizes[missed], minlength=3) - 1
    return np.asarray((others / np.maximum(listed, 1))[sizes[missed]], np.float64)


def _most_suspicious(
    manifest: Manifest, comparison: Comparison, candidates: Sequence[_Candidates], count: int
) -> Iterator[Suspect]:
    """Yield the most suspicious; an object without a label that is detected several times is one suspect."""
    kinds = np.repeat(np.arange(len(candidates)), [len(of_kind.values) for of_kind in candidates])
    values, detections, objects = (np.concatenate([column[number] for column in candidates]) for number in (1, 2, 3))
    unlabelled: list[int] = []
    for position in np.argsort(-values, kind="stable").tolist():
        if count == 0 or values[position] <= 0:
            return
        kind, detection, true = candidates[kinds[position]].kind, int(detections[position]), int(objects[position])
        if kind == "missing":
            if any(_is_same_object(comparison, detection, other) for other in unlabelled):
                continue
            unlabelled.append(detection)
        yield _suspect(manifest, comparison, kind, float(values[position]), detection, true)
        count -= 1


def _is_same_object(comparison: Comparison, one: int, other: int) -> bool:
    """Return whether two detections overlap so much that they are of one object."""
    images, boxes = comparison.detection_images, comparison.detections.boxes_xywh
    if images[one] != images[other]:
        return False
    return bool(iou(boxes[[one]], boxes[[other]], np.zeros(1, np.bool_))[0] >= FOUND_IOU)


def _suspect(
    manifest: Manifest, comparison: Comparison, kind: Kind, suspicion: float, detection: int, true: int
) -> Suspect:
    found, truth = comparison.detections, comparison.truth
    labelled, detected = true >= 0, detection >= 0
    image = int(comparison.truth_images[true] if labelled else comparison.detection_images[detection])
    return Suspect(
        kind=kind,
        suspicion=suspicion,
        image_id=int(comparison.image_ids[image]),
        shard=shard_name(manifest, comparison, image),
        annotation_id=int(truth["annotation_id"][true]) if labelled else None,
        label=int(truth["label"][true]) if labelled else None,
        box_xywh=tuple(truth["bbox"][true].tolist()) if labelled else None,
        found_label=int(found.labels[detection]) if detected else None,
        found_box_xywh=tuple(np.round(found.boxes_xywh[detection], 2).tolist()) if detected else None,
        score=float(found.scores[detection]) if detected else None,
    )
