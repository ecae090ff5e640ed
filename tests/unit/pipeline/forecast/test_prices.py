"""Times that a run has measured, and the prices made of them."""

from dataclasses import replace

import msgspec
import pytest

from pipeline.config import OptimConfig, RunConfig
from pipeline.forecast.prices import Measured, costly_options, measured, prices
from pipeline.forecast.shipped import shipped_prices
from pipeline.recipes import RECIPES

POINTS = [(50, 3.0), (100, 1.0), (150, 1.0), (160, 2.0)]


def times(**changes: object) -> Measured:
    run = measured(POINTS, [10.0, 12.0], begin=0, wall_s=300.0, images=20, options="o", gpu=False, device="X")
    assert run is not None
    return msgspec.structs.replace(run, **changes)


def test_the_slow_first_steps_and_the_start_are_not_charged_to_later_steps() -> None:
    run = times()
    assert run.steps == 160
    assert run.step_s == pytest.approx((100 * 1.0 + 10 * 2.0) / 110)
    assert (run.evaluations, run.evaluation_s) == (2, 11.0)
    assert run.other_s + run.steps * run.step_s + 22.0 == pytest.approx(300.0)


def test_a_continued_run_counts_its_own_steps_only() -> None:
    run = measured(POINTS, [], begin=150, wall_s=30.0, images=20, options="o", gpu=False, device="X")
    assert run is not None
    assert (run.steps, run.step_s, run.other_s) == (10, 2.0, 10.0)
    assert measured(POINTS, [], begin=160, wall_s=30.0, images=20, options="o", gpu=False, device="X") is None


def test_prices_are_medians_and_evaluations_follow_the_number_of_images() -> None:
    runs = [times(step_s=step_s, other_s=other_s) for step_s, other_s in ((1.0, 50.0), (9.0, 40.0), (2.0, 90.0))]
    price = prices(runs, 40, "three runs")
    assert (price.step_s, price.other_s, price.evaluation_s) == (2.0, 50.0, pytest.approx(22.0))
    assert prices([times(evaluations=0, evaluation_s=0.0)], 40, "it").evaluation_s is None


def test_options_that_change_no_time_do_not_tell_runs_apart() -> None:
    config = RunConfig()
    assert costly_options(config) == costly_options(replace(config, seed=7, optim=OptimConfig(lr=1.0, epochs=3)))
    assert costly_options(config) != costly_options(replace(config, optim=OptimConfig(batch_size=32)))
    assert costly_options(config) != costly_options(replace(config, cluster=replace(config.cluster, workers=2)))


def test_figures_of_the_package_are_for_processors_and_known_models() -> None:
    config = replace(RECIPES["detr-r50"], cluster=replace(RECIPES["detr-r50"].cluster, workers=1, cpus_per_worker=2))
    price = shipped_prices(config, 5000)
    assert price is not None
    # 64 images of about 0.57 megapixels at 1.5 s for 0.41; 5,000 of 0.85 at 1.15 s.
    assert price.step_s == pytest.approx(64 * 1.4955 * 1.39, rel=0.05)
    assert price.evaluation_s == pytest.approx(5000 * 1.149, rel=0.01)
    assert "BENCHMARKS.md" in price.source
    assert price.other_s is None
    unknown = replace(config, model=replace(config.model, encoder_layers=3))
    assert shipped_prices(unknown, 5000) is None
