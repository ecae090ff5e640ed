"""Score detections with pycocotools: the twelve COCO metrics, per-class AP and the curves behind them.

The truth comes from the data set's index, and its masks from the shards, so that scoring needs no COCO JSON. As
pycocotools does with results that hold only masks, a true object is small, medium or large by its annotation's area,
for masks as for boxes, and a detected one by the pixels of its mask.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.arrays import Ints
from shards.dataset.index import Index
from shards.dataset.manifest import Manifest
from shards.errors import ShardError
from shards.read.segmentations import true_runs
from shards.score.detections import Detections
from shards.score.precision_recall import Curves, Precision, mean_curves

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MASK_METRICS = tuple(f"mask_{name}" for name in METRICS)


@dataclass(frozen=True)
class ClassScore:
    """AP (IoU 0.50:0.95) and AP50 of a category, -1 if there is no truth of it, and the number of its true boxes.

    `mask_ap` and `mask_ap50` are those of the masks, None if no masks were predicted.
    """

    label: int
    category_id: int
    name: str
    ap: float
    ap50: float
    boxes: int
    mask_ap: float | None = None
    mask_ap50: float | None = None


@dataclass(frozen=True)
class Score:
    """The metrics by name, those of every category, and the curves whose means they are.

    The names are METRICS and, if masks were predicted, MASK_METRICS; otherwise `mask_curves` is None.
    """

    metrics: dict[str, float]
    classes: tuple[ClassScore, ...]
    curves: Curves
    mask_curves: Curves | None = None


def coco_metrics(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> dict[str, float]:
    """Return AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl in 0..1, or -1 if there is no such truth.

    If the detections have masks, also return mask_AP, ..., mask_ARl. `manifest` is the data set with the truth, `rows`
    the images to score (default: all). The best 100 detections per image and category count, as in pycocotools.

    Raise `ShardError` when a detection is not finite, or of an image or label that is not scored, and when masks are to
    be scored and a true object has no segmentation.
    """
    return score_detections(manifest, detections, rows=rows).metrics


def score_detections(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> Score:
    """Return metrics, per-class AP and curves from one evaluation; arguments and errors as for `coco_metrics`."""
    index = manifest.index()
    rows = np.arange(manifest.images) if rows is None else np.unique(np.asarray(rows, np.int64))
    _check(manifest, index, detections, rows)
    images = index.images[rows]
    columns = (images["image_id"].tolist(), images["width"].tolist(), images["height"].tolist())
    dataset = {
        "images": [
            {"id": image_id, "width": width, "height": height} for image_id, width, height in zip(*columns, strict=True)
        ],
        "categories": [{"id": label} for label in range(manifest.num_classes)],
    }
    truth, found = _truth(index, rows), _found(detections)
    metrics, precision = _evaluate("bbox", dataset, truth, found)
    mask_precision = None
    if detections.masks is not None:
        sizes = {image["id"]: [image["height"], image["width"]] for image in dataset["images"]}
        for entry, counts in zip(found, detections.masks, strict=True):
            entry["segmentation"] = {"size": sizes[entry["image_id"]], "counts": counts}
        for entry, runs in zip(truth, true_runs(manifest, rows), strict=True):
            entry["segmentation"] = runs
        mask_metrics, mask_precision = _evaluate("segm", dataset, truth, _with_pixel_areas(found))
        metrics |= dict(zip(MASK_METRICS, mask_metrics.values(), strict=True))
    return Score(
        metrics=metrics,
        classes=_class_scores(manifest, precision, mask_precision, truth),
        curves=mean_curves(precision),
        mask_curves=None if mask_precision is None else mean_curves(mask_precision),
    )


def _evaluate(
    kind: str, dataset: dict[str, Any], truth: list[dict[str, Any]], found: list[dict[str, Any]]
) -> tuple[dict[str, float], Precision]:
    """Return the twelve metrics, and precision [IoU thresholds, recalls, categories, area ranges, max detections]."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and its table
        evaluation = COCOeval(_coco(dataset, truth), _coco(dataset, found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True)), evaluation.eval["precision"]


def _check(manifest: Manifest, index: Index, detections: Detections, rows: Ints) -> None:
    """Raise `ShardError` for detections that pycocotools would silently ignore or fail on."""
    if len(rows) and not (rows[0] >= 0 and rows[-1] < manifest.images):
        raise ShardError(f"got rows {rows[0]}..{rows[-1]} to score, expected 0 <= row < {manifest.images}")
    outside = ~np.isin(index.rows_of(detections.image_ids), rows)
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


def _truth(index: Index, rows: Ints) -> list[dict[str, Any]]:
    records = index.annotations[np.isin(index.annotations["image"], rows)]
    image_ids = index.images["image_id"][records["image"]]
    columns = (image_ids, records["label"], records["bbox"], records["area"], records["iscrowd"])
    # Ids count from 1: pycocotools treats a truth with id 0 as "not matched".
    return [
        {"id": number, "image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
        for number, (image_id, label, box, area, crowd) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]


def _found(detections: Detections) -> list[dict[str, Any]]:
    columns = (detections.image_ids, detections.labels, detections.boxes_xywh, detections.scores)
    return [
        {
            "id": number,
            "image_id": image_id,
            "category_id": label,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "score": value,
        }
        for number, (image_id, label, box, value) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]


def _with_pixel_areas(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from pycocotools import mask

    # One at a time: pycocotools fails on the areas of more than 255.
    return [entry | {"area": float(mask.area(entry["segmentation"]))} for entry in found]


def _coco(dataset: dict[str, Any], annotations: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = dataset | {"annotations": annotations}
    coco.createIndex()
    return coco


def _class_scores(
    manifest: Manifest, precision: Precision, mask_precision: Precision | None, truth: list[dict[str, Any]]
) -> tuple[ClassScore, ...]:
    counts = np.bincount(
        [entry["category_id"] for entry in truth if not entry["iscrowd"]], minlength=manifest.num_classes
    )
    scores = []
    for label, category in enumerate(manifest.categories):
        ap, ap50 = _class_ap(precision, label)
        mask_ap, mask_ap50 = (None, None) if mask_precision is None else _class_ap(mask_precision, label)
        boxes = int(counts[label])
        scores.append(ClassScore(label, category.id, category.name, ap, ap50, boxes, mask_ap, mask_ap50))
    return tuple(scores)


def _class_ap(precision: Precision, label: int) -> tuple[float, float]:
    """Return AP and AP50 of all areas (index 0) and up to 100 detections per image (index -1)."""
    values = precision[:, :, label, 0, -1]
    return _mean_precision(values), _mean_precision(values[0])


def _mean_precision(values: Precision) -> float:
    """Return the mean of the precisions that are defined (not -1), or -1 if none is."""
    defined = values[values > -1]
    return float(defined.mean()) if len(defined) else -1.0
