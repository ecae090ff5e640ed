"""Both scorers give the same arrays, to the last bit, for any truth and any detections."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.dataset.index import ANNOTATION_DTYPE
from shards.masks.rle import encode_masks
from shards.score import with_hotcoco, with_pycocotools
from shards.score.comparison import Comparison
from shards.score.detections import Detections

SIDE = 120  # pixels of an image


def random_boxes(rng: np.random.Generator, count: int, grid: int) -> np.ndarray:
    """Return boxes on a grid, so that many overlap exactly, and some are empty."""
    corners, sizes = rng.integers(0, grid, (count, 2)), rng.integers(0, grid + 1, (count, 2))
    return np.concatenate([corners, sizes], axis=1) * (SIDE / grid)


def random_masks(rng: np.random.Generator, boxes: np.ndarray) -> np.ndarray:
    """Return run lengths of boxes with holes, some of them empty."""
    masks = np.zeros((len(boxes), SIDE, SIDE), bool)
    for mask, (x, y, width, height) in zip(masks, boxes.astype(int), strict=True):
        mask[y : y + height, x : x + width] = rng.random((max(0, min(height, SIDE - y)), min(width, SIDE - x))) < 0.8
    return encode_masks(masks)


@st.composite
def comparisons(draw: st.DrawFn, masks: bool) -> Comparison:
    """Draw images without truth or detections, crowds, empty boxes, equal scores, more than 100 detections an image."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    images, classes, grid = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.sampled_from((2, 8, 40)))
    objects, found = draw(st.integers(0, 12)), draw(st.sampled_from((0, 3, 30, 60 if masks else 400)))
    image_ids = np.sort(rng.choice(10**17, images))  # not every one fits a float64
    truth = np.zeros(objects, ANNOTATION_DTYPE)
    truth["image"] = np.sort(rng.integers(0, images, objects))
    truth["label"] = rng.integers(0, classes, objects)
    truth["bbox"] = random_boxes(rng, objects, grid)
    truth["area"] = truth["bbox"][:, 2] * truth["bbox"][:, 3] * rng.choice([0.1, 0.5, 1], objects)
    truth["iscrowd"] = rng.random(objects) < 0.2
    positions, labels = rng.integers(0, images, found), rng.integers(0, classes, found)
    boxes = random_boxes(rng, found, grid)
    if objects:
        near = rng.random(found) < 0.7  # these are true boxes, some of them shifted or of another class
        source = truth[rng.integers(0, objects, int(near.sum()))]
        positions[near], labels[near] = source["image"], (source["label"] + (rng.random(len(source)) < 0.1)) % classes
        boxes[near] = np.maximum(source["bbox"] + rng.integers(-1, 2, (len(source), 4)), 0)
    steps = draw(st.sampled_from((1, 10, 10**6)))
    scores = (rng.integers(0, steps + 1, found) / steps).astype(np.float32)
    runs = [{"size": [SIDE, SIDE], "counts": counts} for counts in random_masks(rng, truth["bbox"])]
    sides = np.full(images, SIDE)
    return Comparison(
        rows=np.arange(images),
        image_ids=image_ids,
        widths=sides,
        heights=sides,
        classes=classes,
        truth=truth,
        truth_images=truth["image"].astype(np.int64),
        detections=Detections(image_ids[positions], labels, scores, boxes, random_masks(rng, boxes) if masks else None),
        detection_images=positions,
        truth_runs=runs if masks else None,
    )


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_scorers_agree_to_the_last_bit(kind: str, data: st.DataObject) -> None:
    comparison = data.draw(comparisons(masks=kind == "segm"))
    fast, reference = (scorer.evaluate(comparison, kind) for scorer in (with_hotcoco, with_pycocotools))
    np.testing.assert_array_equal(fast.precision, reference.precision)
    np.testing.assert_array_equal(fast.recall, reference.recall)
    assert fast.stats == reference.stats
