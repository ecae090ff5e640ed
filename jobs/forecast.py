"""Forecast for `--dry-run`: what a training would take and cost, without starting anything."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import RunConfig
from shards.errors import ShardError

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from jobs.clusters.entries import Cluster
    from pipeline.forecast.look_ahead import DataSize

Say = Callable[[str], None]
_BUILT_IN = (4000, 200, 4)
"""Training and validation images and classes of the built-in data, which may not exist yet."""


def forecast_here(config: RunConfig, run: str, say: Say, *, anywhere: bool = False) -> str:
    """Return the forecast of a training on this machine; with `anywhere`, on a cluster that is not known here."""
    gpu, device = _here(config, anywhere=anywhere)
    return _forecast(config, run, _client(say), gpu=gpu, device=device, nodes=0, node_price=None)


def _here(config: RunConfig, *, anywhere: bool) -> tuple[bool | None, str | None]:
    """Return whether workers of this machine use GPUs and the name of their device, as far as that is known."""
    if anywhere:
        return {"yes": True, "no": False}.get(config.cluster.gpu), None
    import torch

    from pipeline.driver.forecasting import local_device

    has_gpu = torch.cuda.is_available()
    gpu = config.cluster.gpu == "yes" or (config.cluster.gpu == "auto" and has_gpu)
    return gpu, local_device(gpu) if has_gpu or not gpu else None


def forecast_on(cluster: Cluster, config: RunConfig, run: str, say: Say) -> str:
    """Return the forecast of a training on a cluster, by its nodes, their accelerator and their price.

    run: that of `--run`, which may have checkpoints; empty for a new one.
    """
    nodes = cluster.nodes
    has_gpus = bool(nodes and nodes.gpus)
    gpu: bool | None = {"yes": True, "no": False}.get(config.cluster.gpu, has_gpus if nodes else None)
    if any(cluster.sees_alone(url) for url in (config.data.train, config.data.val)):
        return "forecast     none: only the cluster sees the data, and their size is not known here"
    return _forecast(
        config,
        "" if cluster.sees_alone(config.storage) else run,
        _client(say, cluster.mlflow),
        gpu=gpu,
        device=(nodes.accelerator or None) if nodes and gpu else None,
        nodes=nodes.most if nodes else 0,
        node_price=cluster.price_per_node_hour or None if nodes else None,
    )


def forecast_sweep(runs: Mapping[str, RunConfig], say: Say, *, anywhere: bool = False) -> str:
    """Return the forecast of the trials of a sweep, all trained to their ends one after the other."""
    from pipeline.display.terminal import table
    from pipeline.forecast.look_ahead import look_ahead
    from pipeline.forecast.run_forecast import duration

    client, rows, total, known = _client(say), [], 0.0, True
    for name, config in runs.items():
        gpu, device = _here(config, anywhere=anywhere)
        ahead = look_ahead(config, _data(config), client, gpu=gpu, device=device)
        seconds = ahead.seconds if ahead.complete else None
        total, known = total + (seconds or 0.0), known and seconds is not None
        rows.append((name, f"{ahead.amounts.steps:,}", duration(seconds) if seconds is not None else "unknown"))
    rows.append(("all, one after the other", "", duration(total) if known else "unknown"))
    return table(("trial", "steps", "time"), rows)


def _forecast(
    config: RunConfig,
    run: str,
    client: MlflowClient | None,
    *,
    gpu: bool | None,
    device: str | None,
    nodes: int,
    node_price: float | None,
) -> str:
    from pipeline.forecast.look_ahead import look_ahead

    begin = _begin(config, run)
    ahead = look_ahead(config, _data(config), client, gpu=gpu, device=device, begin=begin)
    lines = ahead.lines(nodes=nodes, node_price=node_price)
    if config.compute.graphs:
        lines += _graphs(config)
    if begin:
        lines.insert(0, f"run {run} has a checkpoint of step {begin}; this is what is left of it")
    return "\n".join(lines)


def _data(config: RunConfig) -> DataSize:
    from pipeline.data.datasets import open_data
    from pipeline.forecast.look_ahead import DataSize, data_size

    try:
        return data_size(*open_data(config.data))
    except (ShardError, OSError):
        if not config.data.built_in:
            raise
        return DataSize(*_BUILT_IN)


def _graphs(config: RunConfig) -> list[str]:
    """Return a line with the share of passes that will replay a CUDA graph; none for data that do not exist yet."""
    from pipeline.data.canvases import choose_canvases
    from pipeline.data.datasets import open_data
    from pipeline.schedule import Schedule

    try:
        train, _ = open_data(config.data)
    except (ShardError, OSError):
        return []
    schedule = Schedule(config.optim, train.images, config.data.epoch_tail)
    return [str(choose_canvases(train, config, schedule, config.cluster.workers))]


def _client(say: Say, address: str = "") -> MlflowClient | None:
    """Return a client of MLflow, or None if it does not answer or holds nothing; a dry run creates no store.

    address: that of a cluster's entry; by default this machine's.
    """
    from pipeline.errors import TrackingAway
    from pipeline.tracking.mlflow_client import connect, tracking_uri

    uri = address or tracking_uri()
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return None
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")
    try:
        return connect(uri)
    except TrackingAway as error:
        say(f"warning: without your earlier runs, since {error}")
        return None


def _begin(config: RunConfig, run: str) -> int:
    """Return the step of the newest checkpoint of the run with this name, 0 for a new one."""
    if not run:
        return 0
    from pipeline.checkpoint import catalog
    from pipeline.checkpoint.location import checkpoint_root, location
    from pipeline.checkpoint.metadata import read_meta

    newest = catalog.newest(checkpoint_root(config.checkpoint.store, location(config.storage) / run))
    return read_meta(newest).step if newest else 0
