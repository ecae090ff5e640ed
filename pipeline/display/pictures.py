"""Pictures of validation images: detections next to the ground truth."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipeline.figures import Boxes, draw, side_by_side
from shards.detections import Detections
from shards.manifest import Manifest
from shards.read import ReadConfig, read_samples
from shards.segmentation import Masks, decode_masks

THRESHOLD = 0.5  # lowest score of a detection that is drawn


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
        chosen = detections.take((detections.image_ids == sample.image_id) & (detections.scores >= THRESHOLD))
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


def _masks(found: Detections, height: int, width: int) -> Masks | None:
    if found.masks is None:
        return None
    return decode_masks([{"size": [height, width], "counts": counts} for counts in found.masks], height, width)
