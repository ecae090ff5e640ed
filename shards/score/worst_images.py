"""Images on which a model errs most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.dataset.manifest import Manifest
from shards.score.comparison import Comparison, shard_name
from shards.score.overlaps import FOUND_IOU, LEAST_SCORE, Overlaps


@dataclass(frozen=True)
class WorstImage:
    """An image with its errors: missed objects and false detections, each as far as the scores are wrong."""

    image_id: int
    shard: str
    """File of the image."""
    objects: int
    """Number of true objects, without crowds."""
    found: int
    missed: int
    false: int
    """Number of false detections."""
    cost: float
    """Errors times their share of errors and hits; a missed object counts 1, a false detection its score."""


def find_worst(
    manifest: Manifest, comparison: Comparison, pairs: Overlaps, hits: Overlaps, count: int
) -> tuple[WorstImage, ...]:
    """Return the `count` images of the highest cost, the highest first; `hits` are the found objects of `pairs`."""
    scores, truth, images = comparison.detections.scores, comparison.truth, len(comparison.rows)
    false = scores >= LEAST_SCORE
    false[hits.detection] = False
    false[pairs.detection[pairs.same & pairs.crowd & (pairs.iou >= FOUND_IOU)]] = False  # as COCO ignores them
    counted = comparison.truth_images[truth["iscrowd"] == 0]
    objects = np.bincount(counted, minlength=images)
    of_hits, of_false = comparison.detection_images[hits.detection], comparison.detection_images[false]
    found = np.bincount(of_hits, minlength=images)
    right = np.bincount(of_hits, scores[hits.detection], minlength=images)
    errors = objects - right + np.bincount(of_false, scores[false], minlength=images)
    cost = errors * errors / np.maximum(errors + right, 1e-9)
    false_counts = np.bincount(of_false, minlength=images)
    order = np.argsort(-cost, kind="stable")[:count]
    return tuple(
        WorstImage(
            image_id=int(comparison.image_ids[image]),
            shard=shard_name(manifest, comparison, image),
            objects=int(objects[image]),
            found=int(found[image]),
            missed=int(objects[image] - found[image]),
            false=int(false_counts[image]),
            cost=float(cost[image]),
        )
        for image in order.tolist()
        if cost[image] > 0
    )
