"""AP of images drawn again, against a data set that really holds the images so many times."""

from dataclasses import replace

import numpy as np
import pytest

from shards.dataset.index import Index
from shards.score.coco_eval import score_detections
from shards.score.comparison import compare
from shards.score.detections import Detections
from shards.score.matches import SIZES, match
from shards.score.resampled import average_precisions, draw, mean_ap
from tests.support.labelled import labelled, learned_by_heart, with_labels

NAMES = {"all": "AP", "small": "APs", "medium": "APm", "large": "APl"}


def problem(seed, images=30):
    """Return a data set with crowds and objects of all sizes, and detections with ties, duplicates and wrong boxes."""
    rng = np.random.default_rng(seed)
    objects = [
        [(int(rng.integers(0, 3)), *rng.uniform(0, 200, 2), *rng.uniform(5, 150, 2)) for _ in range(rng.integers(0, 8))]
        for _ in range(images)
    ]
    data = labelled(objects)
    annotations = np.array(data.index().annotations)
    annotations["iscrowd"] = rng.random(len(annotations)) < 0.1
    data = with_labels(data, Index(np.array(data.index().images), annotations))
    found = learned_by_heart(data, seed)
    found = Detections.concatenate([found, found.take(rng.random(len(found)) < 0.3), *[in_crowds(data)] * 3])
    boxes = found.boxes_xywh * (1 + rng.normal(0, 0.05, found.boxes_xywh.shape))
    return data, replace(found, boxes_xywh=boxes, scores=np.round(found.scores, 2).astype(np.float32))


def in_crowds(data):
    """Return a detection of each crowd."""
    index = data.index()
    crowds = index.annotations[index.annotations["iscrowd"] != 0]
    ids, labels = index.images["image_id"][crowds["image"]].astype(np.int64), crowds["label"].astype(np.int64)
    return Detections(ids, labels, np.full(len(crowds), 0.9, np.float32), crowds["bbox"].copy())


def repeated(data, found, times):
    """Return the data set that holds each image so many times, and the detections on it."""
    index = data.index()
    rows = np.repeat(np.arange(data.images), times)
    images = np.array(index.images)[rows]
    images["image_id"] = np.arange(len(rows))
    counts = images["count"].astype(np.int64)
    starts = np.cumsum(counts) - counts
    at = np.repeat(images["first"].astype(np.int64) - starts, counts) + np.arange(counts.sum())
    annotations = np.array(index.annotations)[at]
    annotations["image"], images["first"] = np.repeat(np.arange(len(rows)), counts), starts
    places = [np.flatnonzero(found.image_ids == index.images["image_id"][row]) for row in rows]
    copies = found.take(np.concatenate(places))
    ids = np.repeat(np.arange(len(rows)), [len(of_image) for of_image in places])
    return with_labels(data, Index(images, annotations)), replace(copies, image_ids=ids)


@pytest.mark.parametrize("seed", range(4))
def test_each_image_once_is_the_score_of_the_reference(seed):
    data, found = problem(seed)
    expected = score_detections(data, found, scorer="pycocotools").metrics
    comparison = compare(data, found, masks=False)
    once = np.ones((data.images, 1), np.float32)
    for size in SIZES:
        counted = average_precisions(match(comparison, (size,))[size], once)
        assert mean_ap(counted)[0] == pytest.approx(expected[NAMES[size]], abs=1e-6)


def test_a_drawn_set_scores_as_one_that_holds_its_images_so_many_times():
    data, found = problem(7)
    # Equal scores in an image would rank by copies in the one, and by detections in the other.
    found = replace(found, scores=np.random.default_rng(1).permutation(len(found)).astype(np.float32) / len(found))
    weights = draw(data.images, 2, np.random.default_rng(0))
    comparison = compare(data, found, masks=False)
    for column in range(2):
        again, copies = repeated(data, found, weights[:, column].astype(np.int64))
        expected = score_detections(again, copies, scorer="pycocotools").metrics
        for size in SIZES:
            counted = average_precisions(match(comparison, (size,))[size], weights)
            assert mean_ap(counted)[column] == pytest.approx(expected[NAMES[size]], abs=1e-6)


def test_only_the_best_hundred_detections_of_an_image_and_class_count():
    data = labelled([[(0, 20.0, 20.0, 70.0, 50.0)]])
    count = 150
    boxes = np.tile([20.0, 20.0, 70.0, 50.0], (count, 1))
    boxes[:-1] += 200
    ids, labels = np.full(count, 100), np.zeros(count, np.int64)
    found = Detections(ids, labels, np.linspace(0.9, 0.1, count).astype(np.float32), boxes)
    matches = match(compare(data, found, masks=False))["all"]
    assert len(matches.labels) == 100
    assert not matches.hit.any()


def test_a_class_without_an_object_in_a_draw_is_undefined_there():
    data = labelled([[(0, 20.0, 20.0, 70.0, 50.0)], [(1, 20.0, 20.0, 70.0, 50.0)]])
    found = learned_by_heart(data)
    weights = np.array([[2, 1], [0, 1]], np.float32)
    counted = average_precisions(match(compare(data, found, masks=False))["all"], weights)
    assert np.isnan(counted[:, 1, 0]).all()
    assert not np.isnan(counted[:, :2, 1]).any()
    assert np.isnan(counted[:, 2]).all()
    assert mean_ap(counted)[0] == pytest.approx(counted[:, 0, 0].mean())


def test_a_draw_takes_as_many_images_as_there_are():
    weights = draw(50, 20, np.random.default_rng(0))
    assert (weights.sum(axis=0) == 50).all()
    assert (weights > 1).any()
