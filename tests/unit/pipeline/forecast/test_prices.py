"""Times that a run has measured, and the prices made of them."""

from dataclasses import replace

import msgspec
import pytest

from pipeline.config import OptimConfig, RunConfig
from pipeline.forecast.prices import Measured, Point, costly_options, measured, prices
from pipeline.forecast.shipped import shipped_prices
from pipeline.recipes import RECIPES

POINTS = [Point(50, 3.0, 1180.0), Point(100, 1.0, 1230.0), Point(150, 1.0, 1292.0), Point(160, 2.0, 1312.0)]
PAUSES = [Point(100, 10.0), Point(160, 12.0)]
CPU = [Point(50, 9.0), Point(100, 0.5), Point(150, 0.5), Point(160, 1.6)]


def times(**changes: object) -> Measured:
    run = measured(
        POINTS, PAUSES, CPU, begin=0, began=1000.0, wall_s=335.0, images=20, options="o", gpu=False, device="X"
    )
    assert run is not None
    return msgspec.structs.replace(run, **changes)


def test_the_slow_first_steps_and_the_start_are_not_charged_to_later_steps() -> None:
    run = times()
    assert run.steps == 160
    assert (run.step_s, run.cpu_s) == (pytest.approx((100 * 1.0 + 10 * 2.0) / 110), pytest.approx(0.6))
    assert (run.evaluations, run.evaluation_s) == (2, 11.0)
    assert (run.start_s, run.end_s) == (pytest.approx(180.0 - 50 * run.step_s), 11.0)
    assert run.saves_s == pytest.approx(132.0 - 110 * run.step_s - 10.0)
    assert run.start_s + run.steps * run.step_s + 22.0 + run.saves_s + run.end_s == pytest.approx(335.0)


def test_a_continued_run_counts_its_own_steps_only() -> None:
    named = {"images": 20, "options": "o", "gpu": False, "device": "X"}
    run = measured(POINTS, PAUSES[:1], begin=150, began=1282.0, wall_s=40.0, **named)  # type: ignore[arg-type]
    assert run is not None
    assert (run.steps, run.step_s, run.evaluations, run.start_s, run.end_s) == (10, 2.0, 0, 10.0, 10.0)
    assert measured(POINTS, [], begin=160, began=0.0, wall_s=30.0, **named) is None  # type: ignore[arg-type]


def test_prices_are_medians_of_the_newest_and_evaluations_follow_the_number_of_images() -> None:
    runs = [
        times(step_s=step_s, start_s=start) for step_s, start in ((1.0, 50.0), (9.0, 40.0), (2.0, 90.0), (80.0, 1.0))
    ]
    price = prices(runs, 40, "four runs")
    assert (price.step_s, price.start_s, price.end_s) == (2.0, 50.0, 11.0)
    assert price.evaluation_s == pytest.approx(22.0)
    assert [each.step_s for each in price.each] == [1.0, 9.0, 2.0, 80.0]
    assert prices([times(evaluations=0, evaluation_s=0.0)], 40, "it").evaluation_s is None


def test_times_of_the_release_before_are_still_prices() -> None:
    tag = b"""{"wall_s": 100, "steps": 10, "step_s": 6, "evaluations": 1, "evaluation_s": 5, "images": 10, "other_s": 35,
        "options": "o", "gpu": true, "device": "X"}"""
    price = prices([msgspec.json.decode(tag, type=Measured)], 10, "it")
    assert (price.step_s, price.start_s, price.end_s, price.saves_s) == (6.0, 35.0, 0.0, 0.0)


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
    assert (price.start_s, price.end_s) == (None, None)
    demo = shipped_prices(RECIPES["demo"], 100)
    assert demo is not None
    assert (demo.step_s, demo.evaluation_s) == (pytest.approx(0.06), pytest.approx(0.7))
    assert (demo.start_s, demo.end_s) == (26.0, 8.0)
    unknown = replace(config, model=replace(config.model, encoder_layers=3))
    assert shipped_prices(unknown, 5000) is None
