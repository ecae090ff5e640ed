"""Pictures and tables of the reasons of a score: worst images, suspect labels, confused classes, calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from pipeline.display.draw import COLOURS, Boxes, Line, chart, draw, side_by_side
from shards.arrays import Floats, Mask
from shards.config import ReadConfig
from shards.dataset.manifest import Manifest
from shards.read.loader import read_samples
from shards.read.sample import Sample
from shards.score.comparison import Comparison, compare
from shards.score.detections import Detections
from shards.score.diagnosis import THRESHOLD, Bin, Diagnosis
from shards.score.overlaps import Overlaps, found_objects, overlaps
from shards.score.suspects import Suspect

_SIZE = (320, 240)  # pixels of one picture of a pair
_MARGIN = 0.75  # on each side of a suspect, in sides of its box
_LEAST_CROP = 96.0  # pixels
NOTHING = "nothing"
_READ = ReadConfig(threads=0)


def worst_pictures(manifest: Manifest, detections: Detections, diagnosis: Diagnosis) -> Iterator[Image.Image]:
    """Yield the worst images in turn, detections of score 0.5 or more beside the truth; only errors have names."""
    ids = [worst.image_id for worst in diagnosis.worst]
    # The scores compare things only.
    things = np.array([category.isthing is not False for category in manifest.categories])
    shown = detections.take(np.isin(detections.image_ids, ids) & (detections.scores >= THRESHOLD))
    shown = shown.take(things[shown.labels])
    for sample, worst in zip(_samples(manifest, ids), diagnosis.worst, strict=True):
        chosen = shown.take(shown.image_ids == sample.image_id)
        comparison = compare(manifest, chosen, np.array([sample.row]), masks=False)
        found = found_objects(comparison, overlaps(comparison))
        caption = f"image {worst.image_id}: {worst.missed} of {worst.objects} missed, {worst.false} false"
        known = (set(found.detection.tolist()), _faultless(comparison, found, sample, things))
        yield _pair(manifest, sample, _whole(sample), chosen, (caption, "truth; names only of errors"), known)


def _faultless(comparison: Comparison, found: Overlaps, sample: Sample, things: Mask) -> set[int]:
    """Return the positions in a sample of all but its missed objects; `comparison` is of its image alone."""
    crowds = comparison.truth["iscrowd"] != 0
    # A sample has no crowds, and is that of the comparison otherwise; one of panoptic data has crowds and stuff.
    objects = np.flatnonzero(things[sample.labels]) if sample.panoptic else np.cumsum(~crowds) - 1
    missed = ~crowds
    missed[found.truth] = False
    return set(range(len(sample.labels))) - set(objects[missed].tolist())


def suspect_pictures(manifest: Manifest, suspects: Sequence[Suspect]) -> Iterator[Image.Image]:
    """Yield the surroundings of each suspect in turn: what the model finds beside all labels."""
    names = [category.name for category in manifest.categories]
    samples = _samples(manifest, [suspect.image_id for suspect in suspects])
    for number, (sample, suspect) in enumerate(zip(samples, suspects, strict=True), start=1):
        found = Detections.empty()
        if suspect.found_box_xywh is not None:
            found = Detections(
                np.array([suspect.image_id]),
                np.array([suspect.found_label]),
                np.array([suspect.score], np.float32),
                np.array([suspect.found_box_xywh]),
            )
        captions = (f"{number}. {suspect_text(suspect, names)}", f"labels of image {suspect.image_id}")
        yield _pair(manifest, sample, _surroundings(suspect, sample), found, captions)


def suspect_text(suspect: Suspect, names: Sequence[str]) -> str:
    """Return what contradicts a label, in a few words."""
    found = "" if suspect.found_label is None else names[suspect.found_label]
    label = "" if suspect.label is None else names[suspect.label]
    return {
        "class": f"{label} looks like {found}",
        "box": f"box of {label} lies elsewhere",
        "missing": f"{found} without a label",
        "spurious": f"nothing found at {label}",
    }[suspect.kind]


def calibration_picture(bins: Sequence[Bin]) -> Image.Image:
    """Return a chart of the share of correct detections over their score, with the line of a calibrated model."""
    scores = [0.0, *(group.score for group in bins), 1.0]
    correct = [-1.0, *(group.correct for group in bins), -1.0]
    lines = [Line("calibrated", "#BBBBBB", scores), Line("this model", COLOURS[4], correct)]
    return chart(lines, scores, "score", "share of correct detections")


def confused_pairs(manifest: Manifest, diagnosis: Diagnosis, most: int = 50) -> dict[str, list[Any]]:
    """Return columns of the most frequent confusions; "nothing" is a missed object, or a detection of none."""
    names = [*(category.name for category in manifest.categories), NOTHING]
    counts = diagnosis.confusion.copy()
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:most]
    pairs = [divmod(int(position), len(names)) for position in order]
    pairs = [(true, found) for true, found in pairs if counts[true, found]]
    totals = diagnosis.confusion.sum(axis=1)
    return {
        "truth": [names[true] for true, _ in pairs],
        "found": [names[found] for _, found in pairs],
        "count": [int(counts[pair]) for pair in pairs],
        "share_of_truth": [round(float(counts[pair] / totals[pair[0]]), 4) for pair in pairs],
    }


def columns(entries: Sequence[Any]) -> dict[str, list[Any]]:
    """Return dataclasses of one kind as columns."""
    rows = [asdict(entry) for entry in entries]
    return {name: [row[name] for row in rows] for name in rows[0]} if rows else {}


def suspects_table(manifest: Manifest, suspects: Sequence[Suspect]) -> dict[str, list[Any]]:
    """Return columns of the suspects, with names of classes instead of labels."""
    names = [category.name for category in manifest.categories]
    table = columns(suspects)
    for name in ("label", "found_label"):
        if table:
            table[name] = [None if label is None else names[label] for label in table[name]]
    return table


def _samples(manifest: Manifest, image_ids: Sequence[int]) -> Iterator[Sample]:
    return iter(read_samples(manifest, manifest.index().rows_of(list(image_ids)), _READ)) if image_ids else iter(())


def _whole(sample: Sample) -> Floats:
    return np.array([0.0, 0.0, sample.width, sample.height])


def _surroundings(suspect: Suspect, sample: Sample) -> Floats:
    """Return x1, y1, x2, y2 around the boxes of a suspect."""
    boxes = np.array([box for box in (suspect.box_xywh, suspect.found_box_xywh) if box is not None])
    low, high = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    sides = np.maximum((high - low) * (1 + 2 * _MARGIN), _LEAST_CROP)
    shape = np.array(_SIZE, np.float64)
    sides = np.maximum(sides, sides[::-1] * shape / shape[::-1])  # in the shape of the frame
    size = np.array([sample.width, sample.height], np.float64)
    sides = np.minimum(sides, size)
    low = np.clip((low + high - sides) / 2, 0, size - sides)
    return np.concatenate([low, low + sides])


def _pair(
    manifest: Manifest,
    sample: Sample,
    region: Floats,
    found: Detections,
    captions: tuple[str, str],
    nameless: tuple[Set[int], Set[int]] = (frozenset(), frozenset()),
) -> Image.Image:
    """Return a region of an image with detections beside the same with the truth, in a frame of one size.

    nameless: positions of detections and of true objects without a name.
    """
    names = [category.name for category in manifest.categories]
    left, top, right, bottom = region.tolist()
    factor = min(_SIZE[0] / (right - left), _SIZE[1] / (bottom - top))
    size = (max(1, round((right - left) * factor)), max(1, round((bottom - top) * factor)))
    frame = Image.new("RGB", _SIZE, "white")
    picture = Image.fromarray(sample.image)
    frame.paste(picture.resize(size, Image.Resampling.BILINEAR, (left, top, right, bottom), 2.0))
    corners = np.concatenate([found.boxes_xywh[:, :2], found.boxes_xywh[:, :2] + found.boxes_xywh[:, 2:]], axis=1)
    both = (
        (corners, found.labels.tolist(), found.scores.tolist()),
        (sample.boxes_xyxy.astype(np.float64), sample.labels.tolist(), None),
    )
    pictures: list[Image.Image] = []
    for (xyxy, labels, scores), without_name in zip(both, nameless, strict=True):
        # Only boxes that reach into the region.
        inside = (xyxy[:, :2] < region[2:]).all(axis=1) & (xyxy[:, 2:] > region[:2]).all(axis=1)
        kept = np.flatnonzero(inside).tolist()
        boxes = Boxes(
            np.clip((xyxy[kept] - np.tile(region[:2], 2)) * factor, 0, np.tile(size, 2) - 1.0),
            [labels[number] for number in kept],
            ["" if number in without_name else names[labels[number]] for number in kept],
            None if scores is None else [scores[number] for number in kept],
        )
        pictures.append(draw(frame, boxes))
    return side_by_side(pictures[0], pictures[1], captions)
