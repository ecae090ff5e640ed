"""Images on which a model errs most, and those on which it finds most without an error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.arrays import Ints
from shards.dataset.manifest import Manifest
from shards.score.comparison import Comparison, shard_name
from shards.score.overlaps import FOUND_IOU, LEAST_SCORE, Overlaps


@dataclass(frozen=True)
class JudgedImage:
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


def find_worst_and_best(
    manifest: Manifest, comparison: Comparison, pairs: Overlaps, hits: Overlaps, worst: int, best: int
) -> tuple[tuple[JudgedImage, ...], tuple[JudgedImage, ...]]:
    """Return the images of the highest cost, the highest first, and those with the most hits beyond their errors.

    `hits` are the found objects of `pairs`. Only images with a hit are among the best.
    """
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

    def judged(order: Ints) -> tuple[JudgedImage, ...]:
        return tuple(
            JudgedImage(
                image_id=int(comparison.image_ids[image]),
                shard=shard_name(manifest, comparison, image),
                objects=int(objects[image]),
                found=int(found[image]),
                missed=int(objects[image] - found[image]),
                false=int(false_counts[image]),
                cost=float(cost[image]),
            )
            for image in order.tolist()
        )

    most_wrong = np.argsort(-cost, kind="stable")[:worst]
    most_right = np.argsort(errors - right, kind="stable")[:best]
    return judged(most_wrong[cost[most_wrong] > 0]), judged(most_right[right[most_right] > 0])
