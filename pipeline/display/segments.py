"""Pictures and tables of panoptic segments: overlays beside the truth, PQ per class, and what it loses to which errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageDraw

from pipeline.display.draw import COLOURS, contact_sheet, figure_picture, font, side_by_side
from pipeline.evaluation.panoptic import FoundSegments
from shards.dataset.categories import Category
from shards.dataset.manifest import Manifest
from shards.panoptic.segment_png import read_ids
from shards.panoptic.segments import TrueSegments
from shards.read.sample import SampleReader
from shards.score.panoptic_quality import PanopticQuality

_Indices = npt.NDArray[np.integer]
_OPACITY = 0.6
_SHADES = (1.0, 0.75, 1.2, 0.6, 1.4)  # of things of one class, so that neighbours differ
_LEAST_NAMED = 0.004  # fraction of the pixels below which a segment gets no name
_MIN_SIDE = 320  # smaller images are enlarged, so that names fit
ERROR_NAMES = {
    "missed": "missed: nothing found there",
    "false": "false: nothing is there",
    "low_quality": "low quality: IoU 0.1 to 0.5",
    "outlines": "outlines: found, IoU below 1",
}
"""Kinds of errors in the order of `ErrorGains`, and their names in pictures."""


def overlay(
    image: Image.Image, indices: _Indices, labels: Sequence[int], categories: Sequence[Category]
) -> Image.Image:
    """Return the picture below its segments in the colours of their categories, with outlines and names.

    indices: [height, width], each pixel's position in `labels`, -1 for none. A category without a colour gets one in turn.
    """
    colours = np.array([*_colours(labels, categories), (0, 0, 0)], np.float32)  # the last for -1
    pixels = np.asarray(image.convert("RGB"), np.float32)
    opacity = np.where(indices >= 0, _OPACITY, 0.0)[..., None]
    mixed = (pixels * (1 - opacity) + colours[indices] * opacity).clip(0, 255).astype(np.uint8)
    factor = max(1, -(-_MIN_SIDE // max(image.size)))
    mixed, enlarged = (array.repeat(factor, 0).repeat(factor, 1) for array in (mixed, indices))
    mixed[_edges(enlarged)] = 255
    picture = Image.fromarray(mixed)
    _write_names(picture, enlarged, [categories[label].name for label in labels])
    return picture


def _colours(labels: Sequence[int], categories: Sequence[Category]) -> Iterator[tuple[float, ...]]:
    seen: dict[int, int] = {}
    for label in labels:
        number = seen[label] = seen.get(label, -1) + 1
        colour = categories[label].color or ImageColor.getrgb(COLOURS[label % len(COLOURS)])[:3]
        yield tuple(min(value * _SHADES[number % len(_SHADES)], 255.0) for value in colour)


def _edges(indices: _Indices) -> npt.NDArray[np.bool_]:
    edges = np.zeros(indices.shape, np.bool_)
    edges[:, 1:] |= indices[:, 1:] != indices[:, :-1]
    edges[1:] |= indices[1:] != indices[:-1]
    return edges


def _write_names(picture: Image.Image, indices: _Indices, names: Sequence[str]) -> None:
    canvas, face = ImageDraw.Draw(picture), font(max(12, round(max(picture.size) / 45)))
    for number, name in enumerate(names):
        rows, columns = np.nonzero(indices == number)
        if len(rows) < _LEAST_NAMED * indices.size:
            continue
        # The pixel of the segment that is nearest to its centre, which need not be inside.
        nearest = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
        place = (float(columns[nearest]), float(rows[nearest]))
        canvas.text(place, name, fill="white", font=face, anchor="mm", stroke_width=2, stroke_fill="black")


def true_indices(truth: TrueSegments) -> npt.NDArray[np.int32]:
    """Return each pixel's position among the true segments, -1 for VOID."""
    indices = np.full(truth.ids.shape, -1, np.int32)
    for number, segment in enumerate(truth.segment_ids):
        indices[truth.ids == segment] = number
    return indices


def segments_sheet(manifest: Manifest, found: Mapping[int, FoundSegments], count: int = 6) -> Image.Image:
    """Draw the `count` images with the lowest ids on one sheet, the segments that were found next to the true ones."""
    index = manifest.index()
    rows = np.argsort(index.images["image_id"], kind="stable")[:count].tolist()
    reader = SampleReader(manifest)
    pictures = []
    try:
        for row in rows:
            sample, truth = reader.read(row), reader.segments(row)
            image = Image.fromarray(sample.image)
            png, labels = found.get(sample.image_id, (b"", ()))
            indices = read_ids(png).astype(np.int32) - 1 if png else np.full(truth.ids.shape, -1, np.int32)
            sides = (
                overlay(image, indices, labels, manifest.categories),
                overlay(image, true_indices(truth), truth.labels.tolist(), manifest.categories),
            )
            pictures.append(side_by_side(*sides, (f"found in image {sample.image_id}", "truth")))
    finally:
        reader.close()
    return contact_sheet(pictures)


def quality_columns(quality: PanopticQuality, categories: Sequence[Category]) -> dict[str, list[Any]]:
    """Return PQ, SQ, RQ and counts of each class that occurs as columns by name."""
    classes = [entry for entry in quality.classes if entry.occurs]
    named = [categories[entry.label] for entry in classes]
    return {
        "name": [category.name for category in named],
        "kind": ["thing" if category.isthing else "stuff" for category in named],
        "PQ": [entry.pq for entry in classes],
        "SQ": [entry.sq for entry in classes],
        "RQ": [entry.rq for entry in classes],
        "matched": [entry.matched for entry in classes],
        "missed": [entry.missed for entry in classes],
        "false": [entry.false for entry in classes],
        "category_id": [category.id for category in named],
    }


def quality_tables(quality: PanopticQuality, categories: Sequence[Category]) -> dict[str, dict[str, list[Any]]]:
    """Return the tables of an evaluation by file name: quality per class, and what PQ would gain without each error."""
    tables = {"per_class_pq.json": quality_columns(quality, categories)}
    if quality.gains:
        gained = [getattr(quality.gains, name) for name in ERROR_NAMES]
        tables["panoptic_errors.json"] = {"error": list(ERROR_NAMES.values()), "PQ_gained_without": gained}
    return tables


def gains_picture(quality: PanopticQuality) -> Image.Image:
    """Return a chart of what PQ would gain without each kind of error, beside PQ as it is."""
    from matplotlib.figure import Figure

    assert quality.gains is not None
    names = [*ERROR_NAMES.values()]
    gained = [getattr(quality.gains, name) for name in ERROR_NAMES]
    pq = quality.all.pq if quality.all else 0.0
    figure = Figure(figsize=(6.4, 2.8), dpi=100)
    axes = figure.add_axes((0.36, 0.2, 0.58, 0.64), xlim=(0, 1), xlabel="PQ")
    axes.barh(names, [pq] * len(names), color="#DDDDDD")
    bars = axes.barh(names, gained, left=pq, color=[COLOURS[5], COLOURS[0], COLOURS[3], COLOURS[1]])
    axes.bar_label(bars, [f"+{value:.3f}" for value in gained], padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"PQ {pq:.3f}, and without each kind of error", fontsize=10)
    return figure_picture(figure)
