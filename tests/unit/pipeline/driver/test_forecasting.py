"""The forecast of a run at its end: compared with the clock, and kept for later runs."""

import time
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from mlflow.exceptions import MlflowException

from pipeline.config import RunConfig
from pipeline.driver.forecasting import compare, forecast_tags
from pipeline.forecast.amounts import Amounts
from pipeline.forecast.prices import Measured, Prices, costly_options
from pipeline.forecast.run_forecast import RunForecast
from pipeline.tracking.tags import TAG_DEVICE, TAG_FORECAST, TAG_TIMES
from pipeline.tracking.tracker import WORKERS

PRICES = Prices(source="s", device="Xeon", step_s=1.0, cpu_s=0.5, evaluation_s=5.0, start_s=6.0, end_s=4.0)
AHEAD = RunForecast(
    amounts=Amounts(steps=60, epochs=10.0, evaluations=2, images=6, checkpoints=6, kept=3),
    checkpoint_bytes=1, workers=1, gpu=False, prices=PRICES,
)  # fmt: skip


class Run:
    """Client of a run with curves and tags."""

    def __init__(self, **curves: list[tuple[int, float]]) -> None:
        self.began = time.time()
        self.curves = {"step/total_s": [(20, 2.0), (40, 1.0), (60, 1.0)], "pause/evaluation_s": [(30, 4.0), (60, 6.0)]}
        self.curves |= {"step/cpu_s": [(20, 2.0), (40, 0.6), (60, 0.6)]}
        self.curves |= {WORKERS: [(1, 1.0)], **curves}
        self.tags = {TAG_DEVICE: "Xeon", TAG_FORECAST: AHEAD.to_json()}
        self.metrics: dict[str, float] = {}

    def get_run(self, _: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags=self.tags))

    def get_metric_history(self, _: str, key: str) -> list[Any]:
        at = {20: 50.0, 30: 74.0, 40: 74.0, 60: 94.0}  # seconds after the command
        return [
            SimpleNamespace(step=step, value=value, timestamp=(self.began + at.get(step, 0.0)) * 1000)
            for step, value in self.curves.get(key, [])
        ]

    def set_tag(self, _: str, key: str, value: str) -> None:
        self.tags[key] = value

    def log_metric(self, _: str, key: str, value: float) -> None:
        self.metrics[key] = value

    def compared(self, config: RunConfig, **changes: Any) -> list[str]:
        lines: list[str] = []
        self.began = time.time() - float(changes.get("wall_s", 104.0))
        options = {"gpu": False, "begin": 0, "total": 60, "wall_s": 104.0, "before_s": 0.0, **changes}
        compare(self, "run", config, 6, say=lines.append, **options)  # type: ignore[arg-type]
        return lines


def test_the_forecast_is_compared_and_the_times_are_kept(tiny_config: RunConfig) -> None:
    run = Run()
    assert run.compared(tiny_config) == [
        "forecast was 1 min 20 s, it took 1 min 44 s (+30%): start 6 s -> 30 s, steps 1 min 00 s -> 1 min 00 s, "
        "evaluations 10 s -> 10 s, end 4 s -> 4 s; processor time of the steps +20%"
    ]
    assert run.metrics == {
        "forecast/seconds": 80.0,
        "forecast/measured_s": 104.0,
        "forecast/error": pytest.approx(0.3),
        "forecast/cpu_error": pytest.approx(0.2),
    }
    times = msgspec.json.decode(run.tags[TAG_TIMES], type=Measured)
    assert (times.steps, times.step_s, times.cpu_s, times.evaluation_s) == (60, 1.0, 0.6, 5.0)
    assert (times.start_s, times.end_s, times.saves_s) == (pytest.approx(30, abs=0.5), pytest.approx(4, abs=0.5), 0.0)
    assert (times.options, times.device, times.gpu) == (costly_options(tiny_config), "Xeon", False)


def test_earlier_commands_of_the_run_count_in_the_comparison_only(tiny_config: RunConfig) -> None:
    run = Run()
    assert "it took 2 min 04 s" in run.compared(tiny_config, begin=30, wall_s=44.0, before_s=80.0)[0]
    times = msgspec.json.decode(run.tags[TAG_TIMES], type=Measured)
    assert (times.steps, times.evaluations, times.wall_s) == (30, 1, 44.0)


@pytest.mark.parametrize("curves", [{"restart/seconds": [(30, 9.0)]}, {WORKERS: [(1, 1.0), (30, 2.0)]}])
def test_a_disturbed_run_is_no_example_for_others(curves: dict[str, Any], tiny_config: RunConfig) -> None:
    run = Run(**curves)
    assert run.compared(tiny_config)
    assert TAG_TIMES not in run.tags


def test_a_run_that_was_made_longer_or_had_no_forecast_is_not_compared(tiny_config: RunConfig) -> None:
    run = Run()
    assert run.compared(tiny_config, total=90) == []
    del run.tags[TAG_FORECAST]
    assert run.compared(tiny_config) == []
    assert run.metrics == {}
    assert TAG_TIMES in run.tags


def test_a_sum_without_the_start_is_not_compared(tiny_config: RunConfig) -> None:
    run = Run()
    known = msgspec.structs.replace(AHEAD, prices=msgspec.structs.replace(PRICES, start_s=None))
    run.tags[TAG_FORECAST] = known.to_json()
    assert run.compared(tiny_config) == []
    assert run.metrics == {}


def test_a_run_that_has_ended_stays_ended_while_mlflow_is_away(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run()

    def away(_: str) -> None:
        raise MlflowException("away")

    monkeypatch.setattr(run, "get_run", away)
    assert run.compared(tiny_config) == ["warning: the times of the run were not kept (MlflowException)"]


def test_a_forecast_that_fails_is_a_warning(tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("a tag of another release")

    monkeypatch.setattr("pipeline.driver.forecasting.data_size", broken)
    lines: list[str] = []
    ready: Any = SimpleNamespace(train=None, val=None)
    assert forecast_tags(SimpleNamespace(), tiny_config, ready, gpu=False, here=False, say=lines.append) == {}  # type: ignore[arg-type]
    assert lines == ["warning: there is no forecast of the run (a tag of another release)"]
