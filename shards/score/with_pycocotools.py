"""Scoring with pycocotools, the reference; hotcoco must give the same arrays."""

from __future__ import annotations

import contextlib
import io
from typing import Any, Literal

from shards.score.comparison import Comparison, Result


def evaluate(comparison: Comparison, kind: Literal["bbox", "segm"]) -> Result:
    """Return the twelve metrics and the arrays behind them, of boxes or of masks."""
    from pycocotools.cocoeval import COCOeval

    truth, found = _truth(comparison), _found(comparison)
    if kind == "segm":
        assert comparison.truth_runs is not None
        _add_masks(truth, comparison.truth_runs)
        _add_masks(found, comparison.detection_runs)
        _set_pixel_areas(found)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and its table
        scored = COCOeval(_coco(comparison, truth), _coco(comparison, found), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return Result(tuple(map(float, scored.stats)), scored.eval["precision"], scored.eval["recall"])


def _truth(comparison: Comparison) -> list[dict[str, Any]]:
    truth = comparison.truth
    image_ids = comparison.image_ids[comparison.truth_images]
    columns = (image_ids, truth["label"], truth["bbox"], truth["area"], truth["iscrowd"])
    # Ids count from 1: pycocotools treats a truth with id 0 as "not matched".
    return [
        {"id": number, "image_id": image_id, "category_id": label, "bbox": box, "area": area, "iscrowd": crowd}
        for number, (image_id, label, box, area, crowd) in enumerate(
            zip(*(column.tolist() for column in columns), strict=True), start=1
        )
    ]


def _found(comparison: Comparison) -> list[dict[str, Any]]:
    detections = comparison.detections
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


def _add_masks(entries: list[dict[str, Any]], runs: list[dict[str, Any]]) -> None:
    for entry, of_entry in zip(entries, runs, strict=True):
        entry["segmentation"] = of_entry


def _set_pixel_areas(found: list[dict[str, Any]]) -> None:
    from pycocotools import mask

    for entry in found:  # one at a time: pycocotools fails on the areas of more than 255
        entry["area"] = float(mask.area(entry["segmentation"]))


def _coco(comparison: Comparison, annotations: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    columns = (comparison.image_ids, comparison.widths, comparison.heights)
    images = [
        {"id": image_id, "width": width, "height": height}
        for image_id, width, height in zip(*(column.tolist() for column in columns), strict=True)
    ]
    coco = COCO()
    coco.dataset = {
        "images": images,
        "categories": [{"id": label} for label in range(comparison.classes)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
