"""Differences in PQ with their intervals, on outcomes of known quality."""

from __future__ import annotations

import numpy as np
import pytest

from shards.errors import ShardError
from shards.score.difference import segment_difference
from shards.score.panoptic_counts import ImageCounts, Outcome, SegmentCounts, in_columns
from shards.score.panoptic_quality import quality
from shards.score.resampled import panoptic_qualities
from tests.support.panoptic_counts import THINGS, drawn_counts, panoptic_grid

IMAGES = 60


def columns(found: float, seed: int) -> SegmentCounts:
    return in_columns(drawn_counts(IMAGES, found, seed))


def test_the_values_are_those_of_the_score() -> None:
    sides = [drawn_counts(IMAGES, found, 1) for found in (0.9, 0.6)]
    result = segment_difference(panoptic_grid(IMAGES), *([in_columns(counts)] for counts in sides), IMAGES, draws=20)
    before, after = (quality(counts, THINGS) for counts in sides)
    assert before.all is not None
    assert after.stuff is not None
    assert [change.name for change in result.figures] == ["PQ", "PQ_things", "PQ_stuff", "SQ", "RQ"]
    assert (result.deciding.before, result.figures[3].before) == (before.all.pq, before.all.sq)
    assert result.figures[2].after == after.stuff.pq
    assert [change.after for change in result.classes] == [entry.pq for entry in after.classes[:3]] + [-1.0]
    assert (result.before_runs, result.images, result.draws) == ((before.all.pq,), IMAGES, 20)


def test_each_draw_is_the_quality_of_the_images_drawn() -> None:
    images = drawn_counts(8, 0.7, 3)
    drawn = np.array([0, 0, 3, 5, 5, 5, 6, 7])
    weights = np.bincount(drawn, minlength=8).astype(np.float32)[:, None]
    pq, sq, rq = panoptic_qualities(in_columns(images), len(THINGS), weights)
    expected = quality([images[number] for number in drawn], THINGS).classes
    assert pq[:3, 0] == pytest.approx([entry.pq for entry in expected[:3]])
    assert sq[:3, 0] == pytest.approx([entry.sq for entry in expected[:3]])
    assert rq[:3, 0] == pytest.approx([entry.rq for entry in expected[:3]])
    assert np.isnan(pq[3, 0])


def test_a_class_knows_its_true_segments_and_their_images() -> None:
    result = segment_difference(panoptic_grid(IMAGES), [columns(0.9, 1)], [columns(0.6, 2)], IMAGES, draws=5)
    assert [(change.objects, change.images) for change in result.classes] == [(60, 60), (60, 60), (60, 60), (0, 0)]


def test_a_model_against_itself_differs_by_nothing() -> None:
    result = segment_difference(panoptic_grid(IMAGES), [columns(0.8, 1)], [columns(0.8, 1)], IMAGES, draws=50)
    assert all((change.difference, change.low, change.high) == (0, 0, 0) for change in result.figures + result.classes)


def test_a_model_that_misses_segments_is_really_worse_and_the_order_gives_the_sign() -> None:
    good, bad, data = columns(0.9, 1), columns(0.5, 2), panoptic_grid(IMAGES)
    worse = segment_difference(data, [good], [bad], IMAGES).deciding
    better = segment_difference(data, [bad], [good], IMAGES).deciding
    assert worse.low < worse.difference < worse.high < 0
    assert (better.low, better.high) == pytest.approx((-worse.high, -worse.low))


def test_sides_that_differ_by_noise_differ_by_chance_in_most_trials() -> None:
    data = panoptic_grid(IMAGES)
    pairs = [(columns(0.8, 2 * trial), columns(0.8, 2 * trial + 1)) for trial in range(20)]
    decided = [
        not segment_difference(data, [one], [other], IMAGES, draws=100).deciding.is_chance for one, other in pairs
    ]
    assert sum(decided) <= 4


def test_draws_in_several_groups_are_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    data, sides = panoptic_grid(IMAGES), ([columns(0.9, 1)], [columns(0.6, 2)])
    at_once = segment_difference(data, *sides, IMAGES, draws=30)
    monkeypatch.setattr("shards.score.difference.segments._BYTES", 4 * IMAGES * 7)
    assert segment_difference(data, *sides, IMAGES, draws=30) == at_once


def test_several_runs_of_a_side_are_compared_by_their_mean() -> None:
    runs = [columns(found, 1) for found in (0.9, 0.8, 0.7)]
    result = segment_difference(panoptic_grid(IMAGES), runs, [columns(0.5, 2)], IMAGES, draws=20)
    assert len(set(result.before_runs)) == 3
    assert result.deciding.before == pytest.approx(np.mean(result.before_runs))


def test_a_class_without_truth_has_no_difference_though_one_side_finds_some() -> None:
    false = ImageCounts(np.array([3]), np.array([Outcome.FALSE], np.int8), np.zeros(1), np.array([-1]), np.array([0]))
    good = drawn_counts(IMAGES, 0.9, 1)
    result = segment_difference(
        panoptic_grid(IMAGES), [in_columns(good)], [in_columns([*good[:-1], false])], IMAGES, draws=10
    )
    nothing = result.classes[3]
    assert (nothing.before, nothing.after, nothing.low, nothing.high) == (-1, -1, 0, 0)
    assert result.deciding.difference < 0


def test_a_side_without_a_run_is_refused() -> None:
    with pytest.raises(ShardError, match="one of the sides"):
        segment_difference(panoptic_grid(2), [], [columns(0.9, 1)], 2)
