"""Forecast of a run by its driver: made when the run is created, and compared with the clock at its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from pipeline.config import RunConfig
from pipeline.distributed.devices import processor_name
from pipeline.driver.preflight import PreparedRun
from pipeline.forecast.look_ahead import data_size, look_ahead
from pipeline.forecast.prices import Measured, Point, costly_options, measured
from pipeline.forecast.run_forecast import RunForecast, duration
from pipeline.tracking.mlflow_client import unavailable
from pipeline.tracking.tags import TAG_DEVICE, TAG_FORECAST, TAG_TIMES
from pipeline.tracking.tracker import WORKERS
from shards.errors import one_line

_SHOWN_S = 0.5  # what took less explains no difference

if TYPE_CHECKING:
    from mlflow import MlflowClient


def forecast_tags(
    client: MlflowClient, config: RunConfig, ready: PreparedRun, *, gpu: bool, here: bool, say: Callable[[str], None]
) -> dict[str, str]:
    """Return the tag with the forecast of a run that is about to start, and print it in a line.

    here: whether the workers run on this machine.
    """
    try:
        device = local_device(gpu) if here else None
        ahead = look_ahead(config, data_size(ready.train, ready.val), client, gpu=gpu, device=device)
    except Exception as error:  # whatever it is, the run can be trained without
        say(f"warning: there is no forecast of the run ({one_line(error)})")
        return {}
    if ahead.seconds is not None and ahead.prices is not None:
        least = "" if ahead.complete else "at least "
        say(f"forecast: {least}{ahead.text()}, by {ahead.prices.source}")
    return {TAG_FORECAST: ahead.to_json()}


def local_device(gpu: bool) -> str:
    """Return the name of the device that workers on this machine train on."""
    if not gpu:
        return processor_name()
    import torch

    return torch.cuda.get_device_name()


def compare(
    client: MlflowClient,
    run_id: str,
    config: RunConfig,
    images: int,
    *,
    gpu: bool,
    begin: int,
    total: int,
    wall_s: float,
    before_s: float,
    say: Callable[[str], None],
) -> None:
    """Compare the forecast of a run that has ended with the clock, and keep its times for later forecasts.

    images: those of an evaluation. begin: step at which this command began, and total: its last. wall_s: its seconds so
    far. before_s: those of earlier commands of the run. A run that was made longer since is not compared.
    """
    passing: tuple[type[Exception], ...] = (*unavailable(), msgspec.DecodeError)
    try:
        tags = client.get_run(run_id).data.tags
        times = _times(client, run_id, config, images, begin, wall_s, gpu, tags.get(TAG_DEVICE, ""))
        if times:
            client.set_tag(run_id, TAG_TIMES, msgspec.json.encode(times).decode())
        text = tags.get(TAG_FORECAST)
        made = msgspec.json.decode(text, type=RunForecast) if text else None
        ahead = made.seconds if made and made.complete and made.amounts.steps == total else None
        if not made or not ahead:
            return
        took = before_s + wall_s
        client.log_metric(run_id, "forecast/seconds", ahead)
        client.log_metric(run_id, "forecast/measured_s", took)
        client.log_metric(run_id, "forecast/error", took / ahead - 1)
        more = _more_cpu(made, times)
        if more is not None:
            client.log_metric(run_id, "forecast/cpu_error", more)
        say(f"forecast was {made.text()}, it took {duration(took)} ({took / ahead - 1:+.0%}){_compared(made, times)}")
    except passing as error:
        say(f"warning: the times of the run were not kept ({type(error).__name__})")


def _compared(made: RunForecast, times: Measured | None) -> str:
    """Return the forecast and the measured seconds by use, of a run that one command has trained."""
    if times is None or times.steps != made.amounts.steps or made.prices is None:
        return ""
    took = {
        "start": times.start_s,
        "steps": times.steps * times.step_s,
        "evaluations": times.evaluations * times.evaluation_s,
        "saves": times.saves_s,
        "end": times.end_s,
    }
    uses = made.uses
    text = ", ".join(
        f"{use} {duration(uses.get(use, 0.0))} -> {duration(seconds)}"
        for use, seconds in took.items()
        if max(seconds, uses.get(use, 0.0)) > _SHOWN_S
    )
    more = _more_cpu(made, times)
    return f": {text}" + ("" if more is None else f"; processor time of the steps {more:+.0%}")


def _more_cpu(made: RunForecast, times: Measured | None) -> float | None:
    """Return how much more processor time a step took than in earlier runs: it is the work, whatever else runs there."""
    known = made.prices.cpu_s if made.prices else None
    return times.cpu_s / known - 1 if times and times.cpu_s and known and not times.gpu else None


def _times(
    client: MlflowClient, run_id: str, config: RunConfig, images: int, begin: int, wall_s: float, gpu: bool, device: str
) -> Measured | None:
    """Return the times of the command that ends now; None if workers were restarted or their number changed."""

    def points(key: str) -> list[Point]:
        history = client.get_metric_history(run_id, key)
        return [Point(int(point.step), float(point.value), point.timestamp / 1000) for point in history]

    restarts = [point for point in points("restart/seconds") if point.step > begin]
    groups = {int(point.value) for point in points(WORKERS) if point.step > begin}
    if restarts or groups - {config.cluster.workers}:
        return None
    return measured(
        points("step/total_s"),
        points("pause/evaluation_s"),
        points("step/cpu_s"),
        begin=begin,
        began=time.time() - wall_s,
        wall_s=wall_s,
        images=images,
        options=costly_options(config),
        gpu=gpu,
        device=device,
    )
