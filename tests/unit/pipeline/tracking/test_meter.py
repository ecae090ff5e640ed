"""Curves at a log point, averaged over steps and ranks, and the warning about waits for data."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from detr.criterion import Losses
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from pipeline.tracking.meter import Interval, Meter, WaitWatch
from pipeline.tracking.progress import Forecast, read_progress
from pipeline.tracking.step_timer import PHASES
from pipeline.tracking.tags import TAG_DATA_WAIT
from tests.support.ranks import run_ranks
from tests.support.tracker import MemoryTracker

CONFIG = RunConfig()
CONFIG = replace(CONFIG, optim=replace(CONFIG.optim, batch_size=10, epochs=4))
SCHEDULE = Schedule(CONFIG.optim, 1000)
RATES = {"main": 0.5, "points": 0.05}


class FakeClock:
    """Clock with fixed seconds for each phase."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def lap(self, phase: str) -> None:
        pass

    def start(self) -> None:
        pass

    def read(self) -> dict[str, float]:
        return dict.fromkeys(PHASES, 0.0) | self.seconds


def add(meter: Meter, loss: float) -> None:
    """Add a step of 10 images with this loss and gradient norm 3."""
    meter.add(Losses(torch.tensor(loss), {"loss_ce_0": torch.tensor(2 * loss)}), torch.tensor(3.0), 10)


def logged(meter: Meter, clock: FakeClock, tracker: MemoryTracker, step: int) -> dict[str, float]:
    meter.clock = clock  # type: ignore[assignment]
    meter.log(step, RATES)
    return {name: value for name, value, at in tracker.points if at == step}


def test_times_are_logged_per_step_and_as_shares() -> None:
    tracker = MemoryTracker()
    meter = Meter(SCHEDULE, Ranks(), tracker, forecast=Forecast(CONFIG, SCHEDULE, 50))
    add(meter, 1.0)
    add(meter, 2.0)
    points = logged(meter, FakeClock(data_wait=0.5, forward=1.0, other=0.5), tracker, 100)
    assert (points["train/loss"], points["train_layers/loss_ce_0"]) == (1.5, 3.0)
    assert (points["step/forward_s"], points["step/data_wait_s"], points["step/total_s"]) == (0.5, 0.25, 1.0)
    assert (points["step_share/forward"], points["step_share/data_wait"]) == (0.5, 0.25)
    assert points["speed/images_per_s"] == 10.0
    assert points["speed/memory_gib"] > 0
    assert (points["epoch"], points["optim/lr"], points["optim/grad_norm"]) == (1.0, 0.5, 3.0)
    assert points["optim/lr_points"] == 0.05
    assert "optim/lr_backbone" not in points
    assert {f"step/{phase}_s" for phase in PHASES} | {f"step_share/{phase}" for phase in PHASES} <= points.keys()
    progress = read_progress(tracker.last_tags)
    assert progress is not None
    assert (progress.step, progress.epoch, progress.ends) == (100, 1.0, None)


def test_processor_time_is_that_of_steps_and_not_of_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now, tracker = [0.0], MemoryTracker()
    monkeypatch.setattr("pipeline.tracking.step_timer.time.process_time", lambda: now[0])
    meter = Meter(SCHEDULE, Ranks(), tracker)
    for _ in range(2):
        add(meter, 1.0)
        now[0] += 3.0
    with meter.paused():
        now[0] += 100.0
    now[0] += 2.0
    assert logged(meter, FakeClock(forward=1.0), tracker, 2)["step/cpu_s"] == 4.0
    add(meter, 1.0)
    now[0] += 7.0
    assert logged(meter, FakeClock(forward=1.0), tracker, 3)["step/cpu_s"] == 7.0


def test_the_predicted_end_is_logged_once_there_is_one() -> None:
    tracker = MemoryTracker()
    meter = Meter(SCHEDULE, Ranks(), tracker, forecast=Forecast(CONFIG, SCHEDULE, 50))
    for _ in range(40):
        add(meter, 1.0)
    logged(meter, FakeClock(forward=40.0), tracker, 40)
    progress = read_progress(tracker.last_tags)
    assert progress is not None
    assert progress.ends is not None


def test_the_forecast_counts_an_evaluation_without_its_checkpoint_stall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, stalled = [0.0], [0.0]
    monkeypatch.setattr("pipeline.tracking.meter.time.perf_counter", lambda: now[0])
    forecast = Forecast(CONFIG, SCHEDULE, 50)
    meter = Meter(SCHEDULE, Ranks(), None, lambda: stalled[0], forecast)
    for _ in range(40):
        add(meter, 1.0)
    logged(meter, FakeClock(forward=40.0), MemoryTracker(), 40)
    before = forecast.remaining_s(40)
    with meter.paused_for_evaluation():
        now[0], stalled[0] = 107.0, 7.0
    assert before is not None
    guess = before - (SCHEDULE.total_steps - 40) * 1.0
    evaluations = forecast._evaluations_from(40)
    assert guess != pytest.approx(evaluations * 100.0)
    assert forecast.remaining_s(40) == pytest.approx(before - guess + evaluations * 100.0)


def test_a_checkpoint_stall_is_not_counted_as_optimizer_time() -> None:
    tracker, stalled = MemoryTracker(), [0.25]
    meter = Meter(SCHEDULE, Ranks(), tracker, lambda: stalled[0])
    for seconds in (0.0625, 0.25):  # the first 0.0625 s of each while saving, with the clock stopped
        with meter.paused():
            stalled[0] += 0.0625
        stalled[0] += seconds - 0.0625  # the rest in the optimizer's update, which waits for the copy
    add(meter, 1.0)
    points = logged(meter, FakeClock(forward=1.0, optimizer=0.5), tracker, 1)
    assert (points["step/optimizer_s"], points["step/checkpoint_stall_s"]) == (0.3125, 0.3125)
    assert points["step/total_s"] == 1.625
    add(meter, 1.0)
    points = logged(meter, FakeClock(forward=1.0, optimizer=0.5), tracker, 2)
    assert (points["step/optimizer_s"], points["step/checkpoint_stall_s"]) == (0.5, 0.0)


def test_nothing_is_logged_without_a_step() -> None:
    tracker = MemoryTracker()
    Meter(SCHEDULE, Ranks(), tracker).log(3, RATES)
    assert not tracker.points


def logged_by_ranks(ranks: Ranks) -> dict[str, float]:
    tracker = MemoryTracker()
    meter = Meter(SCHEDULE, ranks, tracker)
    add(meter, 1.0 + ranks.rank)
    return logged(meter, FakeClock(data_wait=0.5 * ranks.rank, forward=1.0 + ranks.rank), tracker, 1)


def test_the_mean_over_ranks_and_the_longest_wait_are_logged() -> None:
    for points in run_ranks(2, logged_by_ranks):
        assert points["train/loss"] == 1.5
        assert (points["step/forward_s"], points["step/data_wait_s"]) == (1.5, 0.25)
        assert points["step/slowest_data_wait_s"] == 0.5


def watched(*shares: float, steps: int = 20) -> list[str | None]:
    watch = WaitWatch()
    intervals: list[dict[str, Any]] = [
        {"phases": {"data_wait": 0.0, "forward": 1.0}, "waits": [0.0, share], "losses": [], "memory_gib": 0.0}
        for share in shares
    ]
    return [watch.check(steps, Interval(**interval)) for interval in intervals]


def test_a_long_wait_for_data_is_one_warning_with_remedies() -> None:
    first, second, third = watched(0.5, 0.06, 0.07)
    assert (first, third) == (None, None)
    assert second is not None
    assert second.startswith("worker 1 waits for data 6% of the time; expected at most 5%: ")
    for remedy in ("--data.reader-threads", "--transform.pixels fast", "--data.cache"):
        assert remedy in second


def test_the_warning_is_cleared_and_can_come_again() -> None:
    warnings = watched(0.0, 0.06, 0.03, 0.02, 0.04, 0.2)
    assert [None if text is None else bool(text) for text in warnings] == [None, True, None, False, None, True]


def test_short_intervals_are_checked_together() -> None:
    # The first twenty steps are ignored; of the next twenty, ten waited 8% and ten not at all.
    warnings = watched(0.0, 0.0, 0.08, 0.0, 0.2, 0.2, steps=10)
    assert warnings[:5] == [None] * 5
    assert warnings[5]


def test_the_warning_has_its_own_tag() -> None:
    tracker = MemoryTracker()
    meter = Meter(SCHEDULE, Ranks(), tracker)
    for step, wait in ((20, 0.0), (40, 2.0), (60, 0.0)):
        for _ in range(20):
            add(meter, 1.0)
        logged(meter, FakeClock(data_wait=wait, forward=10.0), tracker, step)
        warning = tracker.last_tags.get(TAG_DATA_WAIT, "")
        assert bool(warning) == (step == 40)
