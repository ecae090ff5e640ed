from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from shards.errors import ShardError
from shards.panoptic.segments import TrueSegments
from shards.score.panoptic_counts import Outcome
from shards.score.panoptic_folders import score_folders
from shards.score.panoptic_quality import ErrorGains, ImageCounts, count, quality

THINGS = [True, False]


def truth(ids: list[list[int]], labels: dict[int, int]) -> TrueSegments:
    """Return segments of one image; labels by id."""
    pixels, listed = np.array(ids, np.uint32), np.array(list(labels), np.uint32)
    areas = np.array([(pixels == segment).sum() for segment in listed], np.float64)
    crowds = np.zeros(len(listed), np.bool_)
    return TrueSegments(pixels, listed, np.array(list(labels.values()), np.int64), areas, crowds)


def matched(overlaps: list[float]) -> ImageCounts:
    zeros = np.zeros(len(overlaps), np.int64)
    return ImageCounts(zeros, zeros.astype(np.int8), np.array(overlaps), zeros, zeros)


def test_segments_of_an_image() -> None:
    """A pair, a segment found badly, and one of another class that nothing is found of."""
    known = truth([[7, 7, 7, 7], [8, 8, 8, 8], [9, 9, 9, 9]], {7: 0, 8: 0, 9: 1})
    found = np.array([[0, 0, 0, -1], [1, -1, -1, -1], [-1, -1, -1, 1]])
    counts = count(known, found, [0, 0])
    assert counts.outcomes.tolist() == [Outcome.MATCHED, Outcome.MISSED, Outcome.MISSED, Outcome.FALSE]
    assert counts.labels.tolist() == [0, 0, 1, 0]
    assert counts.overlaps.tolist() == [0.75, 0.2, 0.0, 0.2]
    assert counts.true.tolist() == [0, 1, 2, -1]
    assert counts.found.tolist() == [0, -1, -1, 1]


def test_kinds_of_errors() -> None:
    known = truth([[7, 7, 7, 7], [8, 8, 8, 8], [9, 9, 9, 9]], {7: 0, 8: 0, 9: 1})
    found = np.array([[0, 0, 0, -1], [1, -1, -1, -1], [-1, -1, -1, 1]])
    result = quality([count(known, found, [0, 0])], THINGS)
    thing, stuff = result.classes
    assert (thing.matched, thing.missed, thing.false, thing.low_missed, thing.low_false) == (1, 1, 1, 1, 1)
    assert (stuff.matched, stuff.missed, stuff.low_missed) == (0, 1, 0)
    # PQ is 0.375 and 0. Without the stuff that was missed, its class is perfect; of the thing, both counts go.
    assert result.gains == ErrorGains(missed=0.5, false=0.0, low_quality=0.1875, outlines=0.0625)


def test_sums_do_not_depend_on_the_order_of_images() -> None:
    overlaps = [0.6, 0.7, 0.8, 2 / 3, 0.9]
    assert len({sum(order) for order in permutations(overlaps)}) > 1
    results = [quality([matched([overlap]) for overlap in order], THINGS) for order in permutations(overlaps)]
    assert all(result == results[0] for result in results)
    assert quality([matched(overlaps)], THINGS) == results[0]


def test_group_in_which_nothing_occurs_is_none() -> None:
    result = quality([matched([1.0])], THINGS)
    assert result.stuff is None
    assert result.things == result.all
    assert quality([], THINGS).all is None


def test_prediction_without_segments() -> None:
    counts = count(truth([[7, 7]], {7: 1}), np.full((1, 2), -1), [])
    assert counts.outcomes.tolist() == [Outcome.MISSED]


def test_truth_without_segments() -> None:
    assert len(count(truth([[0, 0]], {}), np.zeros((1, 2), np.int32), [0])) == 0  # on VOID only
    assert count(truth([[5, 5]], {}), np.zeros((1, 2), np.int32), [0]).outcomes.tolist() == [Outcome.FALSE]


@pytest.mark.parametrize(
    ("indices", "labels", "problem"),
    [
        ([[0]], [0], r"got a prediction of \(1, 1\) pixels, expected \(1, 2\)"),
        ([[0, 0]], [0, 1], "got predicted segment 1 without pixels"),
        ([[0, 1]], [0], "got segment 1 in a prediction of 1 segments"),
    ],
)
def test_predictions_that_cannot_be_counted(indices: list[list[int]], labels: list[int], problem: str) -> None:
    with pytest.raises(ShardError, match=problem):
        count(truth([[7, 7]], {7: 0}), np.array(indices), labels)


def test_label_that_the_data_set_lacks() -> None:
    with pytest.raises(ShardError, match="got segments of label 5, expected labels below 2"):
        quality([count(truth([[0, 7]], {7: 0}), np.array([[-1, 0]]), [5])], THINGS)


@pytest.mark.parametrize(
    ("truth", "problem"),
    [
        (None, "No such file"),
        ("{", "malformed|truncated"),
        ('{"categories": [{"id": 1}], "annotations": [], "images": []}', "missing required field `isthing`"),
        ('{"categories": [{"id": 1, "isthing": 1}], "annotations": [], "images": []}', "found.json"),
    ],
)
def test_files_that_cannot_be_scored(tmp_path: Path, truth: str | None, problem: str) -> None:
    if truth is not None:
        (tmp_path / "true.json").write_text(truth)
    with pytest.raises(ShardError, match=problem) as caught:
        score_folders(tmp_path / "true.json", tmp_path, tmp_path / "found.json", tmp_path)
    assert "\n" not in str(caught.value)
