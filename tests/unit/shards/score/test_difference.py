"""Differences in AP with their intervals, on detections of known quality."""

from dataclasses import replace

import numpy as np
import pytest

from shards.errors import ShardError
from shards.score.coco_eval import coco_metrics, score_detections
from shards.score.detections import Detections
from shards.score.difference import FIGURES, difference, interval_of_recipes, spread
from tests.support.labelled import labelled, learned_by_heart

GRID = [(x, y, 70.0, 50.0) for y in (20.0, 170.0) for x in (20.0, 220.0)]


@pytest.fixture
def data():
    return labelled([[((image + number) % 3, *box) for number, box in enumerate(GRID)] for image in range(60)])


def worse(found, share, seed=5):
    """Return the detections without a share of them."""
    return found.take(np.random.default_rng(seed).random(len(found)) >= share)


def noisy(found, seed):
    boxes = found.boxes_xywh * (1 + np.random.default_rng(seed).normal(0, 0.04, found.boxes_xywh.shape))
    return replace(found, boxes_xywh=boxes)


def test_the_values_are_those_of_the_score(data):
    found = learned_by_heart(data)
    other = worse(found, 0.2)
    result = difference(data, [found], [other], draws=20)
    before, after = coco_metrics(data, found), coco_metrics(data, other)
    assert [(change.name, change.before, change.after) for change in result.figures] == [
        (name, before[name], after[name]) for name in FIGURES
    ]
    classes = score_detections(data, other).classes
    assert [(change.name, change.after, change.objects) for change in result.classes] == [
        (entry.name, entry.ap, entry.boxes) for entry in classes
    ]
    assert (result.images, result.draws) == (60, 20)


def test_a_class_knows_in_how_many_images_it_is():
    data = labelled(
        [[(0, *box) for box in GRID] + ([(1, *GRID[0]), (1, *GRID[1])] if image < 3 else []) for image in range(30)]
    )
    found = learned_by_heart(data)
    often, rare = difference(data, [found], [found], draws=5).classes[:2]
    assert (often.images, often.objects, often.is_rare) == (30, 120, False)
    assert (rare.images, rare.objects, rare.is_rare) == (3, 6, True)


def test_a_model_against_itself_differs_by_nothing(data):
    found = learned_by_heart(data)
    result = difference(data, [found], [found], draws=50)
    assert all((change.difference, change.low, change.high) == (0, 0, 0) for change in result.figures + result.classes)
    assert result.deciding.is_chance


def test_a_model_that_misses_objects_is_really_worse(data):
    found = learned_by_heart(data)
    result = difference(data, [found], [worse(found, 0.2)], draws=100)
    assert result.deciding.low < result.deciding.difference < result.deciding.high < 0
    assert not result.deciding.is_chance


def test_the_order_of_the_sides_gives_the_sign(data):
    found = learned_by_heart(data)
    assert difference(data, [worse(found, 0.2)], [found], draws=100).deciding.low > 0


def test_sides_that_differ_by_noise_differ_by_chance_in_most_trials(data):
    found = learned_by_heart(data)
    pairs = [(noisy(found, 2 * trial), noisy(found, 2 * trial + 1)) for trial in range(20)]
    decided = [not difference(data, [one], [other], draws=60).deciding.is_chance for one, other in pairs]
    assert sum(decided) <= 4


def test_the_same_seed_gives_the_same_interval(data):
    found = learned_by_heart(data)
    first, second = (difference(data, [found], [worse(found, 0.1)], draws=30) for _ in range(2))
    assert first == second


def test_draws_in_several_groups_are_the_same_draws(data, monkeypatch):
    found = learned_by_heart(data)
    at_once = difference(data, [found], [worse(found, 0.1)], draws=30)
    monkeypatch.setattr("shards.score.difference.boxes._BYTES", 4 * data.images * 7)
    assert difference(data, [found], [worse(found, 0.1)], draws=30) == at_once


def test_only_the_images_asked_for_are_compared(data):
    found = learned_by_heart(data)
    rows = np.arange(10)
    kept = found.take(np.isin(found.image_ids, data.index().images["image_id"][rows]))
    result = difference(data, [kept], [Detections.empty()], rows=rows, draws=10)
    assert (result.images, result.deciding.after) == (10, 0)


def test_several_runs_of_a_side_are_compared_by_their_mean(data):
    found = learned_by_heart(data)
    runs = [noisy(found, seed) for seed in range(3)]
    result = difference(data, runs, [worse(found, 0.3)], draws=50)
    aps = [coco_metrics(data, run)["AP"] for run in runs]
    assert result.before_runs == tuple(aps)
    assert result.deciding.before == pytest.approx(np.mean(aps))
    assert spread(result.before_runs) == pytest.approx(np.std(aps, ddof=1))
    assert spread(result.after_runs) == 0
    alone = [difference(data, [run], [worse(found, 0.3)], draws=50).deciding for run in runs]
    assert result.deciding.low >= min(change.low for change in alone)


def test_figures_without_truth_have_no_difference(data):
    found = learned_by_heart(data)
    small = difference(data, [found], [worse(found, 0.5)], draws=10).figures[3]
    assert (small.name, small.before, small.after, small.low, small.high) == ("APs", -1, -1, 0, 0)


def test_a_side_without_a_run_is_refused(data):
    with pytest.raises(ShardError, match="one of the sides"):
        difference(data, [], [Detections.empty()])


def test_recipes_differ_by_more_than_the_deviation_of_their_runs() -> None:
    low, high = interval_of_recipes((0.40, 0.41, 0.42), (0.50, 0.51, 0.52))
    assert low == pytest.approx(0.1 - 2.776 * 0.01 * np.sqrt(2 / 3), abs=1e-4)
    assert low + high == pytest.approx(0.2)
    assert interval_of_recipes((0.4,), (0.5, 0.6)) is None
    assert interval_of_recipes((0.4, 0.4), (0.5, 0.5)) == pytest.approx((0.1, 0.1))
