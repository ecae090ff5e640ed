"""Detections against the truth: the twelve COCO numbers and per-class AP, by pycocotools.

The truth comes from the data set's index, so that scoring needs no COCO JSON.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.manifest import Index, Ints, Manifest

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections of many images as columns, in any order; equal scores in one image rank in the order given.

    Attributes:
        image_ids: int64 [M], original image ids.
        labels: int64 [M], labels of the manifest (0..K-1).
        scores: float32 [M].
        boxes_xywh: float64 [M, 4], pixels of the original image.
    """

    image_ids: Ints
    labels: Ints
    scores: npt.NDArray[np.float32]
    boxes_xywh: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        count = len(self.image_ids)
        shapes = [column.shape for column in (self.image_ids, self.labels, self.scores, self.boxes_xywh)]
        if shapes != [(count,), (count,), (count,), (count, 4)]:
            raise ShardError(f"got detection columns of shapes {shapes}, expected [M], [M], [M] and [M, 4]")

    def __len__(self) -> int:
        return len(self.image_ids)

    @classmethod
    def empty(cls) -> "Detections":
        """No detections."""
        nothing = np.zeros(0, np.int64)
        return cls(nothing, nothing, np.zeros(0, np.float32), np.zeros((0, 4), np.float64))

    @classmethod
    def concatenate(cls, parts: Sequence["Detections"]) -> "Detections":
        """All detections of ``parts``, in that order; none where there are no parts."""
        parts = [cls.empty(), *parts]
        return cls(
            np.concatenate([part.image_ids for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.scores for part in parts]),
            np.concatenate([part.boxes_xywh for part in parts]),
        )


@dataclass(frozen=True)
class ClassScore:
    """One category's AP (IoU 0.50:0.95) and AP50, -1 where no truth of it is scored, and how many boxes there were."""

    label: int
    category_id: int
    name: str
    ap: float
    ap50: float
    boxes: int


@dataclass(frozen=True)
class Score:
    """The twelve numbers by name (METRICS), and every category's."""

    metrics: dict[str, float]
    classes: tuple[ClassScore, ...]


def coco_metrics(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100, ARs, ARm, ARl, in 0..1, or -1 where there is no such truth.

    Args:
        manifest: the data set that holds the truth.
        detections: at most 100 per image and category count, the best first, as pycocotools has it.
        rows: the images to score, all by default.

    Raises:
        ShardError: a detection is not finite, or of an image or label that is not scored.
    """
    return score_detections(manifest, detections, rows=rows).metrics


def per_class_ap(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> tuple[ClassScore, ...]:
    """One ClassScore per category, in the order of the labels; arguments and errors as ``coco_metrics``."""
    return score_detections(manifest, detections, rows=rows).classes


def score_detections(manifest: Manifest, detections: Detections, *, rows: Ints | None = None) -> Score:
    """Both the twelve numbers and per-class AP from one evaluation; arguments and errors as ``coco_metrics``."""
    from pycocotools.cocoeval import COCOeval

    index = manifest.index()
    rows = np.arange(manifest.images) if rows is None else np.unique(np.asarray(rows, np.int64))
    _check(manifest, index, detections, rows)
    image_ids = index.images["image_id"][rows].tolist()
    truth = _truth(index, rows)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and its table
        categories = [{"id": label} for label in range(manifest.num_classes)]
        images = [{"id": image_id} for image_id in image_ids]
        evaluation = COCOeval(_coco(images, categories, truth), _coco(images, categories, _found(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    metrics = dict(zip(METRICS, map(float, evaluation.stats), strict=True))
    return Score(metrics, _class_scores(manifest, evaluation.eval["precision"], truth))


def to_coco_json(manifest: Manifest, detections: Detections) -> list[dict[str, Any]]:
    """The detections in COCO's result format, with original category ids, as its evaluation server takes them."""
    category_ids = np.array([category.id for category in manifest.categories], np.int64)
    _check(manifest, manifest.index(), detections, np.arange(manifest.images))
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": value}
        for image_id, category_id, box, value in zip(
            detections.image_ids.tolist(),
            category_ids[detections.labels].tolist(),
            detections.boxes_xywh.tolist(),
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


def _coco(images: list[dict[str, Any]], categories: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


def _class_scores(
    manifest: Manifest, precision: npt.NDArray[np.float64], truth: list[dict[str, Any]]
) -> tuple[ClassScore, ...]:
    """``precision``: [IoU thresholds, recalls, categories, area ranges (0 = all), detections per image (-1 = 100)]."""
    counts = np.bincount(
        [entry["category_id"] for entry in truth if not entry["iscrowd"]], minlength=manifest.num_classes
    )
    scores = []
    for label, category in enumerate(manifest.categories):
        values = precision[:, :, label, 0, -1]
        ap, ap50 = (float(part[part > -1].mean()) if (part > -1).any() else -1.0 for part in (values, values[0]))
        scores.append(ClassScore(label, category.id, category.name, ap, ap50, int(counts[label])))
    return tuple(scores)
