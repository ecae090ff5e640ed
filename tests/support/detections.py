"""Detections to score: guesses near the ground truth, and the ground truth itself."""

import contextlib
import copy
import io
from dataclasses import replace

import numpy as np
from pycocotools.coco import COCO

from shards.masks.rle import encode_masks
from shards.score.coco_eval import Detections


def guesses(data, manifest, seed=0, per_box=3):
    """Return detections near the truth, some of the wrong class."""
    rng = np.random.default_rng(seed)
    labels = {category.id: label for label, category in enumerate(manifest.categories)}
    truth = [annotation for annotation in data["annotations"] for _ in range(per_box)]
    found = np.array([labels[annotation["category_id"]] for annotation in truth])
    wrong = rng.random(len(truth)) < 0.2
    found[wrong] = rng.integers(0, manifest.num_classes, wrong.sum())
    boxes = np.array([annotation["bbox"] for annotation in truth], np.float64)
    boxes += rng.normal(0, 0.1, boxes.shape) * boxes[:, [2, 3, 2, 3]]
    scores = rng.random(len(truth)).astype(np.float32)
    return Detections(
        np.array([annotation["image_id"] for annotation in truth], np.int64), found, scores, np.abs(boxes)
    )


def with_masks(data, manifest, detections, seed=0):
    """Give each detection the mask of its truth, moved, some of them empty."""
    rng = np.random.default_rng(seed)
    truth = COCO()
    truth.dataset = copy.deepcopy(data)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    counts = np.empty(len(detections), object)
    for number, annotation in enumerate(annotation for annotation in truth.dataset["annotations"] for _ in range(3)):
        mask = np.roll(truth.annToMask(annotation), rng.integers(0, 3, 2), (0, 1)) * (rng.random() < 0.9)
        counts[number] = encode_masks(mask.astype(bool)[None])[0]
    return replace(detections, masks=counts)


def truth_itself(manifest):
    index = manifest.index()
    kept = index.annotations[(index.annotations["iscrowd"] == 0) & (index.annotations["bbox"].min(axis=1) > 0)]
    image_ids = index.images["image_id"][kept["image"]]
    return Detections(image_ids, kept["label"].astype(np.int64), np.ones(len(kept), np.float32), kept["bbox"])
