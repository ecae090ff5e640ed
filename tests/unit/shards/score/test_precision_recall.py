"""Precision-recall curves, whose means are the COCO numbers."""

from dataclasses import replace

import numpy as np
import pytest

from shards.score.coco_eval import score_detections
from shards.score.detections import Detections
from shards.score.precision_recall import RECALLS, UNSCORED
from tests.support.detections import guesses, truth_itself, with_masks


def means(curves):
    return [np.mean(curves.precision), np.mean(curves.precision50), np.mean(curves.precision75)]


@pytest.mark.parametrize("seed", range(3))
def test_the_mean_of_each_curve_is_its_ap(coco, seed):
    coco.data["categories"].append({"id": 91, "name": "unicorn"})  # without ground truth: left out, as COCO does
    manifest = coco.write()
    score = score_detections(manifest, guesses(coco.data, manifest, seed))
    expected = [score.metrics[name] for name in ("AP", "AP50", "AP75")]
    assert len(set(expected)) == 3
    assert means(score.curves) == pytest.approx(expected, abs=1e-9, rel=0)
    assert score.mask_curves is None


def test_the_mean_of_each_mask_curve_is_its_mask_ap(coco):
    for number, annotation in enumerate(coco.data["annotations"]):
        if not annotation["iscrowd"]:
            annotation["segmentation"] = [[2, 3, 20 + number, 3, 20 + number, 30, 2, 30], [1, 1, 5, 1, 5, 5]]
    manifest = coco.write()
    boxes = guesses(coco.data, manifest)
    score = score_detections(manifest, with_masks(coco.data, manifest, boxes))
    expected = [score.metrics[name] for name in ("mask_AP", "mask_AP50", "mask_AP75")]
    assert means(score.mask_curves) == pytest.approx(expected, abs=1e-9, rel=0)
    assert score.curves == score_detections(manifest, boxes).curves != score.mask_curves


def findable(coco):
    """Return the data set without crowds and without boxes that have no area."""
    coco.data["annotations"] = [
        annotation
        for annotation in coco.data["annotations"]
        if min(annotation["bbox"]) > 0 and not annotation["iscrowd"]
    ]
    return coco.write()


def test_loose_boxes_are_precise_only_at_low_overlaps(coco):
    manifest = findable(coco)
    exact = truth_itself(manifest)
    narrow = exact.boxes_xywh * [1, 1, 0.625, 1]  # an overlap of 0.625
    curves = score_detections(manifest, replace(exact, boxes_xywh=narrow)).curves
    assert curves.precision50 == pytest.approx([1.0] * 101)
    assert curves.precision75 == (0.0,) * 101
    assert curves.precision == pytest.approx([0.3] * 101)  # at 0.5, 0.55 and 0.6 of the ten


def test_precision_is_zero_beyond_the_reached_recall(coco):
    manifest = findable(coco)
    exact = truth_itself(manifest)
    found = exact.take(np.sort(np.unique(exact.labels, return_index=True)[1]))  # one of each class
    counts = np.bincount(exact.labels)
    assert counts.max() > 1
    assert list(RECALLS) == pytest.approx([number / 100 for number in range(101)])
    expected = np.mean([np.array(RECALLS) <= 1 / count for count in counts if count], axis=0)
    assert score_detections(manifest, found).curves.precision50 == pytest.approx(expected)


def test_curves_are_zero_without_detections_and_minus_one_without_truth(coco):
    manifest = coco.write()
    assert set(vars(score_detections(manifest, Detections.empty()).curves).values()) == {(0.0,) * 101}
    index = manifest.index()
    empty = np.setdiff1d(np.arange(manifest.images), index.annotations["image"])
    assert len(empty)
    score = score_detections(manifest, Detections.empty(), rows=empty)
    assert score.curves == UNSCORED
    assert score.metrics["AP"] == -1
