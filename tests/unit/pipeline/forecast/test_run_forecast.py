"""The forecast of a run: its size, its sum, its text, and the runs that it comes from."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from pipeline.checkpoint import catalog
from pipeline.config import ClusterConfig, OptimConfig, RunConfig
from pipeline.forecast import history
from pipeline.forecast.amounts import Amounts
from pipeline.forecast.checkpoint_size import checkpoint_bytes
from pipeline.forecast.history import past_prices
from pipeline.forecast.look_ahead import DataSize, look_ahead
from pipeline.forecast.prices import Measured, Prices, costly_options
from pipeline.forecast.run_forecast import RunForecast, duration, forecast
from pipeline.tracking.tags import TAG_TIMES, TAG_TRAIN_DIGEST

WORK = Amounts(steps=1000, epochs=4.0, evaluations=4, images=50, checkpoints=6, kept=3)
PRICES = Prices(
    source="your run", device="NVIDIA H100 80GB HBM3", step_s=3.0, evaluation_s=100.0, start_s=150.0, end_s=50.0
)


def past_run(name: str, config: RunConfig, digest: str = "d", **changes: object) -> Any:
    times = Measured(
        wall_s=100.0, steps=10, step_s=2.0, evaluations=1, evaluation_s=5.0, images=50, start_s=20.0, end_s=10.0, saves_s=0.0,
        options=costly_options(config), gpu=False, device="Xeon",
    )  # fmt: skip
    tag = msgspec.json.encode(msgspec.structs.replace(times, **changes)).decode()
    return SimpleNamespace(
        info=SimpleNamespace(run_name=name), data=SimpleNamespace(tags={TAG_TIMES: tag, TAG_TRAIN_DIGEST: digest})
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    found: list[Any] = []
    monkeypatch.setattr(history, "runs_where", lambda *_: found)
    return found


def test_the_size_of_a_checkpoint_is_that_on_disk(tiny_config: RunConfig, uninterrupted: Path) -> None:
    newest = catalog.newest(uninterrupted)
    assert isinstance(newest, Path)
    on_disk = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    predicted = checkpoint_bytes(tiny_config, 2)
    assert on_disk * 0.8 < predicted < on_disk


def test_the_size_of_a_checkpoint_needs_no_random_values(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's device `meta`, drawing one imports torch's compiler, which takes seconds at the start of each run."""

    def draw(*_: object, **__: object) -> None:
        raise AssertionError("a random value is drawn")

    monkeypatch.setattr("torch._refs.normal", draw)
    monkeypatch.setattr("torch._refs.uniform", draw, raising=False)
    assert checkpoint_bytes(tiny_config, 2)


def test_the_sum_is_steps_evaluations_and_the_rest(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, optim=OptimConfig(), cluster=ClusterConfig(workers=8))
    ahead = forecast(config, WORK, 10 << 20, PRICES, gpu=True)
    assert ahead.seconds == 1000 * 3.0 + 4 * 100.0 + 200.0
    lines = "\n".join(ahead.lines(nodes=2, node_price=30.0))
    assert "1 h 00 min: start 2 min 30 s, steps 50 min 00 s, evaluations 6 min 40 s, end 50 s (3 s a step)" in lines
    assert "GPU-hours    8.00" in lines
    assert "cost         60.00: 2 nodes at 30 per hour" in lines
    assert "6 of 10.0 MiB, at most 3 kept: 30.0 MiB" in lines
    assert msgspec.json.decode(ahead.to_json(), type=RunForecast) == ahead


def test_the_span_is_what_each_earlier_run_would_have_taken(tiny_config: RunConfig) -> None:
    fast = msgspec.structs.replace(PRICES, step_s=2.0, evaluation_s=None)
    known = msgspec.structs.replace(PRICES, each=(PRICES, fast))
    ahead = forecast(tiny_config, WORK, 0, known, gpu=True)
    assert ahead.span == (1000 * 2.0 + 4 * 100.0 + 200.0, 1000 * 3.0 + 4 * 100.0 + 200.0)
    assert ahead.text() == "1 h 00 min (43 min 20 s to 1 h 00 min by each)"
    assert msgspec.json.decode(ahead.to_json(), type=RunForecast) == ahead
    assert forecast(tiny_config, WORK, 0, PRICES, gpu=True).span is None


def test_times_of_another_release_are_passed_over(tiny_config: RunConfig, runs: list[Any]) -> None:
    runs += [past_run("old", tiny_config), past_run("new", tiny_config)]
    runs[0].data.tags[TAG_TIMES] = '{"other": "form"}'
    found = past_prices(SimpleNamespace(), tiny_config, 50)  # type: ignore[arg-type]
    assert found is not None
    assert "(new)" in found.source


@pytest.mark.parametrize(
    ("count", "begins"), [(2, "2 of your runs of"), (5, "the median of the newest 3 of 5 of your")]
)
def test_the_source_tells_a_median_from_the_runs_beside_it(
    count: int, begins: str, tiny_config: RunConfig, runs: list[Any]
) -> None:
    runs += [past_run(f"run-{number}", tiny_config) for number in range(6)][:count]
    found = past_prices(SimpleNamespace(), tiny_config, 50)  # type: ignore[arg-type]
    assert found is not None
    assert found.source.startswith(begins)


@pytest.mark.parametrize(
    ("wanted", "name", "fits"),
    [
        ("H100", "NVIDIA H100 80GB HBM3", True),
        ("nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3", "NVIDIA H100 80GB HBM3", True),
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", True),
        ("A100-80GB", "NVIDIA A100-SXM4-40GB", False),
        ("nvidia-tesla-t4", "Tesla T4", True),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
    ],
)
def test_a_device_is_known_by_its_launchers_name(wanted: str, name: str, fits: bool) -> None:
    assert history._fits(wanted, name) == fits


def test_nothing_measured_is_no_forecast(tiny_config: RunConfig, runs: list[Any]) -> None:
    ahead = look_ahead(tiny_config, DataSize(24, 6, 2), SimpleNamespace(), gpu=True, device="H100")  # type: ignore[arg-type]
    assert ahead.seconds is None
    text = "\n".join(ahead.lines(nodes=2, node_price=30.0))
    assert "time         unknown" in text
    assert "nothing: neither a run of yours" in text
    assert "cost" not in text


def test_background_evaluations_take_no_time_but_the_last(tiny_config: RunConfig) -> None:
    config = replace(tiny_config, evaluate=replace(tiny_config.evaluate, asynchronous=True))
    ahead = forecast(config, WORK, 0, PRICES, gpu=True)
    assert ahead.seconds == 1000 * 3.0 + 100.0 + 200.0
    assert "4 of 50 images" in "\n".join(ahead.lines())


def test_only_runs_of_the_same_work_on_the_same_device_count(tiny_config: RunConfig, runs: list[Any]) -> None:
    other = replace(tiny_config, optim=replace(tiny_config.optim, batch_size=3))
    runs += [
        past_run("other-batch", other, step_s=9.0),
        past_run("on-gpu", tiny_config, step_s=0.1, gpu=True, device="NVIDIA H100 80GB HBM3"),
        past_run("mine", tiny_config),
        past_run("other-data", tiny_config, digest="e", step_s=7.0),
    ]
    client: Any = None

    def found(**wanted: Any) -> Prices:
        prices = past_prices(client, tiny_config, 50, **wanted)
        assert prices is not None
        return prices

    assert (found(gpu=False, digest="d").step_s, found(gpu=True).step_s) == (2.0, 0.1)
    assert "your run of this recipe in MLflow (mine)" in found(gpu=False, digest="d").source
    assert found(device="h100").device == "NVIDIA H100 80GB HBM3"
    assert found(device="nvidia-h100-80gb").step_s == 0.1
    assert past_prices(client, tiny_config, 50, device="H200") is None
    elsewhere = found(gpu=False, digest="f")
    assert elsewhere.step_s == 4.5
    assert elsewhere.source.startswith("2 of your runs")
    assert elsewhere.source.endswith("on other data")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.25 s"), (41.4, "41 s"), (760, "12 min 40 s"), (18120, "5 h 02 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
