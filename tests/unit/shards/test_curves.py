"""The curves have the COCO numbers as their means."""

from dataclasses import replace

import numpy as np
import pytest

from shards.curves import RECALLS, UNSCORED
from shards.detections import Detections
from shards.score import score_detections
from tests.unit.shards.test_score import guesses, truth_itself, with_masks


def means(curves):
    return [np.mean(curves.precision), np.mean(curves.precision50), np.mean(curves.precision75)]


@pytest.mark.parametrize("seed", range(3))
def test_the_means_of_the_curves_are_the_ap_at_their_overlaps(coco, seed):
    coco.data["categories"].append({"id": 91, "name": "unicorn"})  # without truth: left out, as COCO does
    manifest = coco.write()
    score = score_detections(manifest, guesses(coco.data, manifest, seed))
    expected = [score.metrics[name] for name in ("AP", "AP50", "AP75")]
    assert len(set(expected)) == 3
    assert means(score.curves) == pytest.approx(expected, abs=1e-9, rel=0)
    assert score.mask_curves is None


def test_the_means_of_the_curves_of_masks_are_the_ap_of_masks(coco):
    for number, one in enumerate(coco.data["annotations"]):
        if not one["iscrowd"]:
            one["segmentation"] = [[2, 3, 20 + number, 3, 20 + number, 30, 2, 30], [1, 1, 5, 1, 5, 5]]
    manifest = coco.write()
    boxes = guesses(coco.data, manifest)
    score = score_detections(manifest, with_masks(coco.data, manifest, boxes))
    expected = [score.metrics[name] for name in ("mask_AP", "mask_AP50", "mask_AP75")]
    assert means(score.mask_curves) == pytest.approx(expected, abs=1e-9, rel=0)
    assert score.curves == score_detections(manifest, boxes).curves != score.mask_curves


def findable(coco):
    """The data set without crowds and without boxes of no area."""
    coco.data["annotations"] = [one for one in coco.data["annotations"] if min(one["bbox"]) > 0 and not one["iscrowd"]]
    return coco.write()


def test_what_is_found_loosely_is_precise_at_low_overlaps_alone(coco):
    manifest = findable(coco)
    exact = truth_itself(manifest)
    narrow = exact.boxes_xywh * [1, 1, 0.625, 1]  # so much overlap
    curves = score_detections(manifest, replace(exact, boxes_xywh=narrow)).curves
    assert curves.precision50 == pytest.approx([1.0] * 101)
    assert curves.precision75 == (0.0,) * 101
    assert curves.precision == pytest.approx([0.3] * 101)  # at 0.5, 0.55 and 0.6 of the ten


def test_beyond_the_recall_that_is_reached_precision_is_zero(coco):
    manifest = findable(coco)
    exact = truth_itself(manifest)
    found = exact.take(np.sort(np.unique(exact.labels, return_index=True)[1]))  # of each class one, surely
    counts = np.bincount(exact.labels)
    assert counts.max() > 1
    assert list(RECALLS) == pytest.approx([number / 100 for number in range(101)])
    expected = np.mean([np.array(RECALLS) <= 1 / count for count in counts if count], axis=0)
    assert score_detections(manifest, found).curves.precision50 == pytest.approx(expected)


def test_nothing_found_is_zero_and_no_truth_is_minus_one(coco):
    manifest = coco.write()
    assert set(vars(score_detections(manifest, Detections.empty()).curves).values()) == {(0.0,) * 101}
    index = manifest.index()
    empty = np.setdiff1d(np.arange(manifest.images), index.annotations["image"])
    assert len(empty)
    score = score_detections(manifest, Detections.empty(), rows=empty)
    assert score.curves == UNSCORED
    assert score.metrics["AP"] == -1
