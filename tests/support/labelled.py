"""A data set in memory that has labels and no pictures, and errors planted in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from shards.dataset.categories import Category
from shards.dataset.index import ANNOTATION_DTYPE, IMAGE_DTYPE, Index
from shards.dataset.manifest import Manifest, Shard
from shards.score.detections import Detections

SIDE = 400


def labelled(objects: Sequence[Sequence[tuple[int, float, float, float, float]]], classes: int = 3) -> Manifest:
    """Return a data set of one image of 400 x 400 pixels per sequence of (label, x, y, width, height)."""
    images = np.zeros(len(objects), IMAGE_DTYPE)
    images["image_id"], images["width"], images["height"] = 100 + np.arange(len(objects)), SIDE, SIDE
    images["count"] = [len(of_image) for of_image in objects]
    images["first"] = np.cumsum(images["count"]) - images["count"]
    annotations = np.zeros(int(images["count"].sum()), ANNOTATION_DTYPE)
    annotations["image"] = np.repeat(np.arange(len(objects)), images["count"])
    rows = [entry for of_image in objects for entry in of_image]
    annotations["label"] = [entry[0] for entry in rows]
    annotations["bbox"] = np.array([entry[1:] for entry in rows], np.float64).reshape(-1, 4)
    annotations["area"] = annotations["bbox"][:, 2:].prod(axis=1)
    annotations["annotation_id"] = 1000 + np.arange(len(rows))
    manifest = Manifest(
        format=2,
        name="labelled",
        source_digest="",
        samples_per_shard=len(objects),
        images=len(objects),
        annotations=len(annotations),
        categories=tuple(Category(10 + label, f"class {label}") for label in range(classes)),
        files=(),
        shards=(Shard("shard-000000.tar", len(objects), 1, ""),),
    )
    return with_labels(manifest, Index(images, annotations))


def with_labels(manifest: Manifest, index: Index) -> Manifest:
    """Return a copy of the data set with another index."""
    copy = msgspec.structs.replace(manifest, images=len(index.images), annotations=len(index.annotations))
    copy.__dict__["_index"] = index
    return copy


def without(manifest: Manifest, positions: Sequence[int]) -> Manifest:
    """Return a copy of the data set without these annotations."""
    index = manifest.index()
    images, annotations = np.array(index.images), np.delete(np.array(index.annotations), list(positions))
    images["count"] = np.bincount(annotations["image"], minlength=len(images))
    images["first"] = np.cumsum(images["count"]) - images["count"]
    return with_labels(manifest, Index(images, annotations))


def learned_by_heart(manifest: Manifest, seed: int = 0) -> Detections:
    """Return what a model gives that knows every object: its class, nearly its box, high scores, and weak noise."""
    rng = np.random.default_rng(seed)
    index = manifest.index()
    known = index.annotations[index.annotations["iscrowd"] == 0]
    sides = known["bbox"][:, [2, 3, 2, 3]]
    boxes = np.maximum(known["bbox"] + rng.normal(0, 0.02, (len(known), 4)) * sides, 0)
    found = Detections(
        index.images["image_id"][known["image"]].astype(np.int64),
        known["label"].astype(np.int64),
        rng.uniform(0.8, 0.99, len(known)).astype(np.float32),
        boxes,
    )
    count = 20 * len(index.images)
    noise = Detections(
        np.repeat(index.images["image_id"].astype(np.int64), 20),
        rng.integers(0, manifest.num_classes, count),
        rng.beta(0.5, 12, count).astype(np.float32),
        np.concatenate([rng.uniform(0, 200, (count, 2)), rng.uniform(10, 200, (count, 2))], axis=1),
    )
    return Detections.concatenate([found, noise])


def moved(detections: Detections, boxes: np.ndarray) -> Detections:
    """Return the detections with other boxes."""
    return replace(detections, boxes_xywh=np.maximum(boxes, 0))
