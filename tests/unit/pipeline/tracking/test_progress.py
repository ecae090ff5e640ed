from dataclasses import replace
from datetime import UTC, datetime

import pytest

from pipeline.config import RunConfig
from pipeline.schedule import Schedule
from pipeline.tracking.progress import Forecast, RunProgress, read_progress
from pipeline.tracking.tags import TAG_PROGRESS

# 400 steps of ten images, an evaluation after each hundred.
CONFIG = RunConfig()
CONFIG = replace(CONFIG, optim=replace(CONFIG.optim, batch_size=10, epochs=4, max_steps=0))
SCHEDULE = Schedule(CONFIG.optim, 1000)
LONG = replace(CONFIG.optim, epochs=300)


def test_the_forecast_starts_at_step_200_or_earlier_in_a_short_run() -> None:
    forecast = Forecast(CONFIG, SCHEDULE, 50)
    forecast.stepped(39, 39.0, 0.0)
    assert forecast.remaining_s(39) is None
    forecast.stepped(1, 1.0, 0.0)
    assert forecast.remaining_s(40) is not None
    forecast = Forecast(CONFIG, Schedule(LONG, 1000), 50)
    for step in range(50, 200, 50):
        forecast.stepped(50, 50.0, 0.0)
        assert forecast.remaining_s(step) is None
    forecast.stepped(50, 50.0, 0.0)
    assert forecast.remaining_s(200) is not None


def test_remaining_steps_and_evaluations_are_counted() -> None:
    forecast = Forecast(CONFIG, SCHEDULE, 50)
    forecast.stepped(100, 50.0, 0.0)
    forecast.evaluated(7.0)
    assert forecast.remaining_s(100) == pytest.approx(300 * 0.5 + 4 * 7)  # including the one due at step 100
    assert forecast.remaining_s(101) == pytest.approx(299 * 0.5 + 3 * 7)
    assert forecast.remaining_s(400) == pytest.approx(7)


def test_the_first_evaluation_is_estimated_from_the_forward_pass() -> None:
    forecast = Forecast(CONFIG, SCHEDULE, 50)
    forecast.stepped(50, 50.0, 0.2)  # ten images: 50 take 1 s
    assert forecast.remaining_s(50) == pytest.approx(350 + 4)
    limited = Forecast(replace(CONFIG, evaluate=replace(CONFIG.evaluate, limit=25)), SCHEDULE, 50)
    limited.stepped(50, 50.0, 0.2)
    assert limited.remaining_s(50) == pytest.approx(350 + 2)


def test_the_first_interval_and_old_ones_are_ignored() -> None:
    forecast = Forecast(CONFIG, Schedule(LONG, 1000), 50)
    forecast.stepped(200, 2000.0, 0.0)
    assert forecast.remaining_s(200) == pytest.approx(29800 * 10.0)
    forecast.stepped(200, 200.0, 0.0)
    assert forecast.remaining_s(400) == pytest.approx(29600 * 1.0)
    for _ in range(5):
        forecast.stepped(200, 400.0, 0.0)
    assert forecast.remaining_s(1400) == pytest.approx(28600 * 2.0)


@pytest.mark.parametrize("workers", [1, 4])
def test_only_the_last_background_evaluation_counts_on_one_process(workers: int) -> None:
    beside = replace(CONFIG, evaluate=replace(CONFIG.evaluate, asynchronous=True))
    forecast = Forecast(beside, SCHEDULE, 50, workers)
    forecast.stepped(100, 50.0, 0.2)  # ten images by all workers: 50 take 1 s, and as many times longer on one worker
    for step in (100, 101, 250, 400):  # training does not wait for those at 100, 200 and 300
        assert forecast.remaining_s(step) == pytest.approx((400 - step) * 0.5 + workers)


def test_evaluations_during_training_use_all_workers() -> None:
    forecast = Forecast(CONFIG, SCHEDULE, 50, 4)
    forecast.stepped(50, 50.0, 0.2)
    assert forecast.remaining_s(50) == pytest.approx(350 + 4)


def test_progress_is_read_as_it_was_written() -> None:
    for progress in (RunProgress(7, 0.5), RunProgress(7, 0.5, "2031-05-04T03:02:01+00:00")):
        assert read_progress({TAG_PROGRESS: progress.to_json()}) == progress
    assert read_progress({}) is None
    assert progress.ends == datetime(2031, 5, 4, 3, 2, 1, tzinfo=UTC)
