"""Outcomes of panoptic predictions drawn at random, and a data set in memory that they could be of."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np

from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.evaluation.panoptic import PanopticScore
from shards.dataset.categories import Category
from shards.dataset.manifest import Manifest
from shards.score.coco_eval import score_detections
from shards.score.detections import Detections
from shards.score.panoptic_counts import ImageCounts, Outcome, in_columns
from shards.score.panoptic_quality import quality
from tests.support.labelled import labelled

THINGS = [True, True, False, False]
"""Kinds of the four classes, of which the last never occurs in the truth."""


def panoptic_grid(images: int) -> Manifest:
    """Return panoptic data in memory: a thing of the first class in each image."""
    made = labelled([[(0, 20.0, 20.0, 70.0, 50.0)]] * images, classes=len(THINGS))
    categories = tuple(Category(10 + label, f"class {label}", thing) for label, thing in enumerate(THINGS))
    copy = msgspec.structs.replace(made, categories=categories)
    copy.__dict__["_index"] = made.index()
    return copy


def drawn_counts(images: int, found: float, seed: int) -> list[ImageCounts]:
    """Return outcomes of images with a segment of each of three classes, a share of which is found."""
    rng = np.random.default_rng(seed)
    counts = []
    for hits in rng.random((images, 3)) < found:
        order = np.argsort(~hits, kind="stable")  # pairs that match come first
        outcomes = np.where(hits, Outcome.MATCHED, Outcome.MISSED).astype(np.int8)[order]
        overlaps = np.where(hits, rng.uniform(0.6, 1.0, 3), 0.0)[order]
        counts.append(ImageCounts(order, outcomes, overlaps, order, np.where(hits, order, -1)[order]))
    return counts


def scored(data: Manifest, detections: Detections, counts: list[ImageCounts]) -> Evaluation:
    """Return an evaluation of these detections and segments."""
    score, rows = score_detections(data, detections), np.arange(data.images)
    segments = PanopticScore(quality(counts, THINGS), {}, in_columns(counts))
    return Evaluation(replace(score, metrics=score.metrics | segments.metrics), detections, rows, segments)
