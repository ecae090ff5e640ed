"""Detections of an evaluation, kept in one file so that models are compared later without running them.

The file has columns in safetensors, so nothing is unpickled: image ids and the number of detections of each, labels,
scores and boxes; of a panoptic model also the outcome of each segment, from which PQ follows. 5,000 images with 100
detections each take 10.5 MB. Masks are not kept: they would take ten times that.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.checkpoint.location import Location
from pipeline.errors import PipelineError, RegistryError
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.figures import deciding_name
from shards.arrays import Floats, Ints
from shards.dataset.manifest import Manifest
from shards.errors import ShardError, one_line
from shards.score.detections import Detections
from shards.score.difference import Difference, difference, segment_difference
from shards.score.panoptic_quality import SegmentCounts
from shards.store import storage
from shards.store.retry import fewer_retries

LOG = logging.getLogger(__name__)
KEPT_NAME = "detections.safetensors"
_FORMAT = "1"


@dataclass(frozen=True, eq=False)
class Kept:
    """Detections of boxes on the images of a data set, by any model."""

    digest: str
    """Digest of the data set's manifest."""
    data: str
    """Folder or URL of the data set."""
    image_ids: Ints
    """Images that were scored, int64 [I], ascending."""
    detections: Detections
    figure: str = ""
    """Figure by which the evaluation is compared with others, as `deciding_name` gives it; empty in older files."""
    segments: SegmentCounts | None = None
    """Outcomes of the segments, by position in `image_ids`, of a model with masks on panoptic data."""


def keep(manifest: Manifest, evaluation: Evaluation) -> Kept:
    """Return what is kept of an evaluation."""
    ids = np.sort(manifest.index().images["image_id"][evaluation.rows].astype(np.int64))
    found = evaluation.detections
    boxes_only = Detections(found.image_ids, found.labels, found.scores, found.boxes_xywh)
    return Kept(
        manifest.digest,
        manifest.url,
        ids,
        boxes_only.take(np.argsort(found.image_ids, kind="stable")),
        deciding_name(evaluation.score.metrics),
        None if evaluation.panoptic is None else evaluation.panoptic.counts,
    )


def to_bytes(kept: Kept) -> bytes:
    """Return the file's content; reading it gives the same detections to the last bit."""
    found = kept.detections
    columns: dict[str, Any] = {
        "image_ids": kept.image_ids,
        "counts": np.bincount(np.searchsorted(kept.image_ids, found.image_ids), minlength=len(kept.image_ids)),
        "labels": found.labels,
        "scores": found.scores,
    }
    if kept.segments is not None:
        per_image = np.bincount(kept.segments.images, minlength=len(kept.image_ids))
        columns |= {"segment_counts": per_image, "segment_labels": kept.segments.labels}
        columns |= {"segment_outcomes": kept.segments.outcomes, "segment_overlaps": kept.segments.overlaps}
    for name in columns.keys() & {"counts", "labels", "segment_counts", "segment_labels"}:
        columns[name] = columns[name].astype(np.min_scalar_type(int(columns[name].max(initial=0))))
    # A model gives corners in single precision, which take half the space of the boxes that are made from them.
    corners = found.boxes_xywh.copy()
    corners[:, 2:] += corners[:, :2]
    corners = corners.astype(np.float32)
    if np.array_equal(_boxes(corners), found.boxes_xywh):
        columns["corners"] = corners
    else:
        columns["boxes"] = found.boxes_xywh
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    facts = {"format": _FORMAT, "digest": kept.digest, "data": kept.data, "figure": kept.figure}
    return save(columns, facts)


def from_bytes(content: bytes, source: object) -> Kept:
    """Return the detections of a file's content; raise `RegistryError` for one that is damaged."""
    try:
        columns, facts = load(content), _facts(content)
        if facts.get("format") != _FORMAT:
            raise ValueError(f"format {facts.get('format')}")
        ids, labels = columns["image_ids"].astype(np.int64), columns["labels"].astype(np.int64)
        boxes = _boxes(columns["corners"]) if "corners" in columns else columns["boxes"]
        of_images = np.repeat(ids, columns["counts"].astype(np.int64))
        detections = Detections(of_images, labels, columns["scores"], boxes)
        segments = _segments(columns) if "segment_counts" in columns else None
        return Kept(facts["digest"], facts["data"], ids, detections, facts.get("figure", ""), segments)
    except (SafetensorError, KeyError, ValueError, IndexError, msgspec.DecodeError, ShardError) as error:
        raise RegistryError(
            f"{source} cannot be used ({one_line(error)}); expected detections kept by `detr`: delete it, and compare with "
            "--data, which evaluates again"
        ) from None


def _boxes(corners: Any) -> Floats:
    boxes = corners.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    return np.asarray(boxes, np.float64)


def _segments(columns: Mapping[str, Any]) -> SegmentCounts:
    per_image, labels = columns["segment_counts"].astype(np.int64), columns["segment_labels"].astype(np.int64)
    images = np.repeat(np.arange(len(columns["image_ids"])), per_image)
    outcomes, overlaps = columns["segment_outcomes"], columns["segment_overlaps"]
    if not len(images) == len(labels) == len(outcomes) == len(overlaps):
        raise ValueError("columns of segments of different lengths")
    return SegmentCounts(images, labels, outcomes, overlaps)


def _facts(content: bytes) -> Mapping[str, str]:
    """Return the metadata in the header, which safetensors reads from files only."""
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    found: Mapping[str, str] = msgspec.json.decode(header, type=dict[str, Any]).get("__metadata__", {})
    return found


def keep_beside(path: Location, manifest: Manifest, evaluation: Evaluation) -> None:
    """Write the detections beside the checkpoint that made them; if that fails, only log why: no run ends because of it.

    They are deleted with the checkpoint.
    """
    try:
        with fewer_retries():
            storage.write(str(path / KEPT_NAME), to_bytes(keep(manifest, evaluation)))
    except (OSError, ShardError, PipelineError) as error:
        LOG.warning("the detections of %s are not kept (%s); `detr compare` needs --data for it", path, one_line(error))


def read_beside(path: Location) -> Kept | None:
    """Return the detections beside a checkpoint; None if they were not kept."""
    try:
        return from_bytes(storage.read(str(path / KEPT_NAME)), path / KEPT_NAME)
    except FileNotFoundError:
        return None


def difference_of(
    manifest: Manifest, before: Sequence[Kept], after: Sequence[Kept], *, sizes: bool = True
) -> Difference:
    """Return the difference between two sides on the data set; raise `RegistryError` if they are not of the same images.

    PQ decides if segments of all are kept, else AP of boxes.
    """
    first = before[0]
    for kept in (*before, *after):
        if kept.digest != manifest.digest:
            raise RegistryError(
                f"got detections on other data than {manifest.url} (digests {kept.digest[:12]} and "
                f"{manifest.digest[:12]}), whose figures cannot be compared; expected the same data: give --data URL"
            )
        if not np.array_equal(kept.image_ids, first.image_ids):
            raise RegistryError(
                f"got detections on {len(first.image_ids)} and on {len(kept.image_ids)} images of {manifest.url}; expected "
                "the same images: give --data URL, which evaluates on all of them"
            )
    rows = manifest.index().rows_of(first.image_ids)
    sides = [[kept.detections for kept in side] for side in (before, after)]
    found = difference(manifest, *sides, rows=rows, sizes=sizes)
    of_segments = [[kept.segments for kept in side if kept.segments is not None] for side in (before, after)]
    if list(map(len, of_segments)) != [len(before), len(after)]:
        return found
    in_segments = segment_difference(manifest, of_segments[0], of_segments[1], len(first.image_ids))
    return replace(in_segments, figures=in_segments.figures + found.figures)


def decided_by(figure: str, manifest: Manifest, names: Sequence[str], kept: Sequence[Kept]) -> str:
    """Return the figure that decides between models, and the reason if it is not the one by which `@best` is chosen."""
    if figure == "AP" and manifest.panoptic:
        without = dict.fromkeys(name for name, found in zip(names, kept, strict=True) if found.segments is None)
        return f"AP of boxes of things, since no segments of {', '.join(without)} are kept"
    if figure == "AP" and any(found.figure == "mask_AP" for found in kept):
        return "AP of boxes, since masks are not kept; @best goes by AP of masks"
    return figure
