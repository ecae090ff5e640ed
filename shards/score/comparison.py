"""Truth and detections of the images to score, in columns, as both scorers take them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import numpy as np
import numpy.typing as npt

from shards.arrays import Ints, Records
from shards.dataset.index import Index
from shards.dataset.manifest import Manifest
from shards.errors import ShardError
from shards.masks.rle import Runs
from shards.read.segmentations import true_runs
from shards.score.detections import Detections
from shards.score.precision_recall import Precision


@dataclass(frozen=True)
class Result:
    """Results of a scorer for boxes or masks, with the arrays of pycocotools' `accumulate`.

    stats: the twelve COCO metrics, in the order of METRICS.
    precision: [IoU thresholds, recalls, categories, area ranges, detections per image]; -1 without truth.
    recall: [IoU thresholds, categories, area ranges, detections per image]; -1 without truth.
    """

    stats: tuple[float, ...]
    precision: Precision
    recall: npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Truth and detections of the scored images.

    An image is known by its position among the scored ones, in ascending order of image ids: ids need not fit the
    float64 columns of a scorer, and detections of equal score rank in that order.
    """

    rows: Ints
    """Rows of the scored images in the index, int64 [I], in ascending order of image ids."""
    image_ids: Ints
    """Original image ids, int64 [I], ascending."""
    widths: Ints
    heights: Ints
    classes: int
    truth: Records
    """True objects of these images, ANNOTATION_DTYPE [A], in the order of the index, crowds included."""
    truth_images: Ints
    """Image of each true object, int64 [A]."""
    detections: Detections
    """Detections in the given order, which decides between equal scores in one image."""
    detection_images: Ints
    """Image of each detection, int64 [M]."""
    truth_runs: list[Runs] | None = None
    """Masks of the true objects as runs; None if no masks are scored."""

    @property
    def detection_runs(self) -> list[Runs]:
        """Masks of the detections as runs."""
        assert self.detections.masks is not None
        sizes = list(zip(self.heights.tolist(), self.widths.tolist(), strict=True))
        return [
            {"size": list(sizes[image]), "counts": counts}
            for image, counts in zip(self.detection_images.tolist(), self.detections.masks, strict=True)
        ]


def compare(
    manifest: Manifest, detections: Detections, rows: Ints | None = None, *, masks: bool | None = None
) -> Comparison:
    """Return truth and detections of `rows` (default: all), checked.

    masks: read the masks of the truth from the shards; by default if the detections have masks. Of panoptic data, only
    things are compared, as published figures are: stuff has no objects.

    Raise `ShardError` as `coco_metrics` does.
    """
    index = manifest.index()
    rows = np.arange(manifest.images) if rows is None else np.unique(np.asarray(rows, np.int64))
    _check(manifest, index, detections, rows)
    if masks is None:
        masks = detections.masks is not None
    # Rows are ascending here, as the annotations of the index are.
    records = index.annotations[np.isin(index.annotations["image"], rows)]
    runs = true_runs(manifest, rows) if masks else None
    if manifest.panoptic:
        things = np.array([category.isthing for category in manifest.categories])
        compared = things[records["label"]]
        runs = list(compress(runs, compared)) if runs is not None else None
        records, detections = records[compared], detections.take(things[detections.labels])
    rows = rows[np.argsort(index.images["image_id"][rows], kind="stable")]
    images = index.images[rows]
    positions = np.zeros(manifest.images, np.int64)
    positions[rows] = np.arange(len(rows))
    return Comparison(
        rows=rows,
        image_ids=images["image_id"].astype(np.int64),
        widths=images["width"].astype(np.int64),
        heights=images["height"].astype(np.int64),
        classes=manifest.num_classes,
        truth=records,
        truth_images=positions[records["image"]],
        detections=detections,
        detection_images=positions[index.rows_of(detections.image_ids)],
        truth_runs=runs,
    )


def shard_name(manifest: Manifest, comparison: Comparison, image: int) -> str:
    """Return the file name of the shard that holds a scored image."""
    return manifest.shards[int(manifest.index().images["shard"][comparison.rows[image]])].name


def _check(manifest: Manifest, index: Index, detections: Detections, rows: Ints) -> None:
    """Raise `ShardError` for detections that a scorer would silently ignore or fail on."""
    if len(rows) and not (rows[0] >= 0 and rows[-1] < manifest.images):
        raise ShardError(f"got rows {rows[0]}..{rows[-1]} to score, expected 0 <= row < {manifest.images}")
    scored = np.zeros(manifest.images, np.bool_)
    scored[rows] = True
    outside = ~scored[index.rows_of(detections.image_ids)]
    if outside.any():
        raise ShardError(
            f"got {int(outside.sum())} detections of images that are not scored, such as image "
            f"{int(detections.image_ids[outside][0])}; expected only the {len(rows)} images asked for"
        )
    labels = detections.labels
    wrong = (labels < 0) | (labels >= manifest.num_classes)
    if wrong.any():
        raise ShardError(
            f"got label {int(labels[wrong][0])}, expected 0 <= label < {manifest.num_classes} (labels of the manifest, "
            "not original category ids)"
        )
    broken = ~(np.isfinite(detections.scores) & np.isfinite(detections.boxes_xywh).all(axis=1))
    if broken.any():
        raise ShardError(
            f"got {int(broken.sum())} detections that are not finite, such as in image "
            f"{int(detections.image_ids[broken][0])}; expected finite scores and boxes: the model has diverged"
        )
