"""Pictures of an evaluation: detections on images, and curves of precision over recall, also as a table."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from pipeline.display.draw import COLOURS, Boxes, Line, chart, contact_sheet, draw, side_by_side
from pipeline.display.segments import segments_sheet
from pipeline.evaluation.evaluate_model import Evaluation
from shards.config import ReadConfig
from shards.dataset.manifest import Manifest
from shards.masks.rle import Masks, decode_masks
from shards.read.loader import read_samples
from shards.score.detections import Detections
from shards.score.precision_recall import RECALLS, Curves

_THRESHOLD = 0.5  # lowest score of a detection that is drawn


def detection_pictures(manifest: Manifest, detections: Detections, count: int) -> Iterator[Image.Image]:
    """Yield detections (score 0.5 or more) beside the ground truth, for the `count` images with the lowest ids.

    The images are the same at each call, so that a series of pictures shows how the detections change during the run.
    """
    index = manifest.index()
    rows = np.argsort(index.images["image_id"], kind="stable")[:count].astype(np.int64)
    names = [category.name for category in manifest.categories]
    masks = detections.masks is not None
    for sample in read_samples(manifest, rows, ReadConfig(threads=0, masks=masks)):
        image = Image.fromarray(sample.image)
        chosen = detections.take((detections.image_ids == sample.image_id) & (detections.scores >= _THRESHOLD))
        boxes = chosen.boxes_xywh
        labels = chosen.labels.tolist()
        found = Boxes(
            np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
            labels,
            [names[label] for label in labels],
            chosen.scores.tolist(),
            _masks(chosen, sample.height, sample.width),
        )
        truth = Boxes(
            sample.boxes_xyxy.astype(np.float64),
            sample.labels.tolist(),
            [names[label] for label in sample.labels],
            masks=sample.masks,
        )
        captions = (f"found in image {sample.image_id}", "truth")
        yield side_by_side(draw(image, found), draw(image, truth), captions)


def picture_sheet(manifest: Manifest, detections: Detections, count: int = 6) -> Image.Image:
    """Draw `count` validation images on one sheet, detections next to the ground truth."""
    return contact_sheet(list(detection_pictures(manifest, detections, count)))


def evaluation_sheet(manifest: Manifest, evaluation: Evaluation, count: int = 6) -> Image.Image:
    """Draw `count` validation images on one sheet, what an evaluation found next to the truth: segments or detections."""
    if evaluation.panoptic:
        return segments_sheet(manifest, evaluation.panoptic.drawn, count)
    return picture_sheet(manifest, evaluation.detections, count)


def _masks(found: Detections, height: int, width: int) -> Masks | None:
    if found.masks is None:
        return None
    return decode_masks([{"size": [height, width], "counts": counts} for counts in found.masks], height, width)


def curves_picture(boxes: Curves, masks: Curves | None = None) -> Image.Image:
    """Return a chart of the curves at IoU 0.50, 0.75 and 0.50:0.95 with their means; those of masks on the right."""
    if masks is None:
        return _chart(boxes)
    return side_by_side(_chart(boxes), _chart(masks), ("boxes", "masks"))


def _chart(curves: Curves) -> Image.Image:
    lines = [
        Line(f"{name} {fmean(ys):.3f}" if ys[0] >= 0 else f"{name} -", colour, ys)
        for name, colour, ys in (
            ("AP50", COLOURS[4], curves.precision50),
            ("AP75", COLOURS[5], curves.precision75),
            ("AP (IoU 0.50:0.95)", "black", curves.precision),
        )
    ]
    return chart(lines, RECALLS, "recall", "precision")


def curves_table(boxes: Curves, masks: Curves | None = None) -> dict[str, list[Any]]:
    """Return columns by name: recall, and precision at IoU 0.50:0.95, 0.50 and 0.75; masks with prefix `mask_`."""
    columns: dict[str, list[Any]] = {"recall": list(RECALLS)}
    for prefix, curves in (("", boxes), ("mask_", masks)):
        if curves:
            columns |= {prefix + name: list(ys) for name, ys in vars(curves).items()}
    return columns
