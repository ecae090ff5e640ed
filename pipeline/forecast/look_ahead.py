"""Forecast of a run from its configuration and its data sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from pipeline.forecast.amounts import amounts
from pipeline.forecast.checkpoint_size import checkpoint_bytes
from pipeline.forecast.history import past_prices
from pipeline.forecast.run_forecast import RunForecast, forecast
from pipeline.forecast.shipped import shipped_prices
from pipeline.schedule import Schedule
from shards.dataset.manifest import Manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class DataSize:
    """Facts about a run's data that a forecast needs."""

    images: int
    val_images: int
    num_classes: int
    digest: str = ""
    """Digest of the training data; empty if they do not exist yet."""


def data_size(train: Manifest, val: Manifest) -> DataSize:
    """Return the facts about two data sets."""
    return DataSize(train.images, val.images, train.num_classes, train.digest)


def look_ahead(
    config: RunConfig,
    data: DataSize,
    client: MlflowClient | None,
    *,
    gpu: bool | None,
    device: str | None = None,
    begin: int = 0,
) -> RunForecast:
    """Return the forecast from the step `begin` on, by the user's runs in MLflow or else by figures of this package.

    gpu: whether workers use GPUs, None if that is not known. device: name of their device, or a piece of it; None takes
    that of the newest run.
    """
    schedule = Schedule(config.optim, data.images, config.data.epoch_tail)
    work = amounts(config, schedule, data.val_images, begin)
    found = None
    if client is not None:
        found = past_prices(client, config, work.images, gpu=gpu, device=device, digest=data.digest)
    if found is None and not gpu:
        found = shipped_prices(config, work.images)
    return forecast(config, work, checkpoint_bytes(config, data.num_classes), found, gpu=bool(gpu))
