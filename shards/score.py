"""Detections against the truth: the twelve COCO numbers, per-class AP and the curves behind them, by pycocotools.

The truth comes from the data set's index, and that of masks from its shards, so that scoring needs no COCO JSON. As
pycocotools does with results that hold only masks, a true object is small, medium or large by its annotation's area,
for masks as for boxes, and a detected one by the pixels of its mask.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.curves import Curves, Precision, mean_curves
from shards.detections import Detections
from shards.errors import ShardError
from shards.index import Index, Ints
from shards.manifest import Manifest
from shards.segmentation import true_runs

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
MASK_METRICS = tuple(f"mask_{name}" for name in METRICS)


@dataclass(frozen=True)
class ClassScore:
    """One category's AP (IoU 0.50:0.95) and AP50, -1 where no truth of it is scored, and how many boxes there were.

    ``mask_ap`` and ``mask_ap50`` are those of the masks, None where none were predicted.
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
    """The twelve numbers by name (METRICS; and MASK_METRICS where masks were predicted), every category's, and the curves
    that they are the means of; ``mask_curves`` is None where no masks were predicted.
    """

    metrics: dict[str, float]
    classes: tuple[ClassScore, ...]
    curves: Curves
    mask_curves: Curves | None = None


def coco_metrics(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, in 0..1, or -1 where there is no such truth.

    Where the detections have masks, the same of the masks as well: mask_AP, ..., mask_ARl.

    Args:
        manifest: the data set that holds the truth.
        detections: at most 100 per image and category count, the best first, as pycocotools has it.
        rows: the images to score, all by default.

    Raises:
        ShardError: a detection is not finite, or of an image or label that is not scored; masks are to be scored and
            a true object has no segmentation.
    """
    return score_detections(manifest, detections, rows=rows).metrics


def per_class_ap(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> tuple[ClassScore, ...]:
    """One ClassScore per category, in the order of the labels; arguments and errors as ``coco_metrics``."""
    return score_detections(manifest, detections, rows=rows).classes


def score_detections(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> Score:
    """The twelve numbers, per-class AP and the curves from one evaluation; arguments and errors as ``coco_metrics``."""
    index = manifest.index()
    rows = np.arange(manifest.images) if rows is None else np.unique(np.asarray(rows, np.int64))
    _check(manifest, index, detections, rows)
    images = index.images[rows]
    columns = (images["image_id"].tolist(), images["width"].tolist(), images["height"].tolist())
    dataset = {
        "images": [{"id": one, "width": width, "height": height} for one, width, height in zip(*columns, strict=True)],
        "categories": [{"id": label} for label in range(manifest.num_classes)],
    }
    truth, found = _truth(index, rows), _found(detections)
    metrics, precision = _evaluate("bbox", dataset, truth, found)
    mask_precision = None
    if detections.masks is not None:
        sizes = {one["id"]: [one["height"], one["width"]] for one in dataset["images"]}
        for entry, counts in zip(found, detections.masks, strict=True):
            entry["segmentation"] = {"size": sizes[entry["image_id"]], "counts": counts}
        for entry, runs in zip(truth, true_runs(manifest, rows), strict=True):
            entry["segmentation"] = runs
        mask_metrics, mask_precision = _evaluate("segm", dataset, truth, _with_pixel_areas(found))
        metrics |= dict(zip(MASK_METRICS, mask_metrics.values(), strict=True))
    mask_curves = None if mask_precision is None else mean_curves(mask_precision)
    return Score(
        metrics, _class_scores(manifest, precision, mask_precision, truth), mean_curves(precision), mask_curves
    )


def _evaluate(
    kind: str, dataset: dict[str, Any], truth: list[dict[str, Any]], found: list[dict[str, Any]]
) -> tuple[dict[str, float], Precision]:
    """The twelve numbers, and precision [IoU thresholds, recalls, categories, area ranges, detections per image]."""
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and its table
        evaluation = COCOeval(_coco(dataset, truth), _coco(dataset, found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(METRICS, map(float, evaluation.stats), strict=True)), evaluation.eval["precision"]


def to_coco_json(manifest: Manifest, detections: Detections) -> list[dict[str, Any]]:
    """The detections in COCO's result format, with original category ids, as its evaluation server takes them.

    Masks, where there are any, come without the boxes: pycocotools would take the objects' areas from those.
    """
    category_ids = np.array([category.id for category in manifest.categories], np.int64)
    _check(manifest, manifest.index(), detections, np.arange(manifest.images))
    where: list[dict[str, Any]] = [{"bbox": box} for box in detections.boxes_xywh.tolist()]
    if detections.masks is not None:
        images = manifest.index().images[manifest.index().rows_of(detections.image_ids)]
        sizes = zip(images["height"].tolist(), images["width"].tolist(), strict=True)
        where = [
            {"segmentation": {"size": list(size), "counts": counts.decode()}}
            for size, counts in zip(sizes, detections.masks, strict=True)
        ]
    return [
        {"image_id": image_id, "category_id": category_id, **place, "score": value}
        for image_id, category_id, place, value in zip(
            detections.image_ids.tolist(),
            category_ids[detections.labels].tolist(),
            where,
            detections.scores.tolist(),
            strict=True,
        )
    ]


def _check(manifest: Manifest, index: Index, detections: Detections, rows: Ints) -> None:
    """Refuse what pycocotools would silently ignore or choke on."""
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
    # Counted from 1: pycocotools takes a truth with id 0 for "not matched".
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

    # One by one: pycocotools fails on the areas of more than 255.
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
    return tuple(
        ClassScore(
            label,
            category.id,
            category.name,
            *_class_ap(precision, label),
            int(counts[label]),
            *(() if mask_precision is None else _class_ap(mask_precision, label)),
        )
        for label, category in enumerate(manifest.categories)
    )


def _class_ap(precision: Precision, label: int) -> tuple[float, float]:
    """AP and AP50 over all areas (0) and up to 100 detections per image (-1); -1 where there is no truth."""
    values = precision[:, :, label, 0, -1]
    ap, ap50 = (float(part[part > -1].mean()) if (part > -1).any() else -1.0 for part in (values, values[0]))
    return ap, ap50
