"""The stream of batches: its threads outlive epochs and end with it, and no epoch's plan is waited for."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from detr.config import TransformConfig
from detr.geometry import draw_geometry
from pipeline.config import RunConfig
from pipeline.data import loader as module
from pipeline.data.loader import augmented_sizes, rank_slices, training_batches
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from shards.dataset.manifest import Manifest, load_manifest
from shards.errors import ShardError
from shards.plan.epoch import EpochPlan, plan_epoch


@pytest.fixture
def manifest(tiny_config: RunConfig) -> Manifest:
    return load_manifest(tiny_config.data.train)


def threads_named(prefix: str) -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(prefix)}


def test_reader_threads_run_until_the_stream_is_closed(manifest: Manifest, tiny_config: RunConfig) -> None:
    config = replace(tiny_config, data=replace(tiny_config.data, reader_threads=2))
    schedule = Schedule(config.optim, manifest.images)  # two epochs of three steps
    before = set(threading.enumerate())
    stream = training_batches(manifest, config, schedule, Ranks(), 0, schedule.total_steps)
    next(stream)
    at_first = threads_named("shards") - before
    for _ in range(4):
        next(stream)
    assert threads_named("shards") - before == at_first
    assert len(at_first) == 2
    stream.close()
    assert set(threading.enumerate()) <= before


def test_an_error_of_a_sample_ends_the_threads(
    manifest: Manifest, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Callable[..., Any]:
        def transform(sample: Any) -> None:
            raise ValueError("no such picture")

        return transform

    monkeypatch.setattr(module, "training_transform", failing)
    before = set(threading.enumerate())
    with pytest.raises(ShardError, match="no such picture"):
        next(training_batches(manifest, tiny_config, Schedule(tiny_config.optim, 12), Ranks(), 0, 6))
    assert set(threading.enumerate()) <= before


def test_the_next_epoch_is_planned_in_the_background(
    manifest: Manifest, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: dict[int, threading.Thread] = {}
    second = threading.Event()

    def plan(*arguments: Any, epoch: int, **more: Any) -> EpochPlan:
        planned[epoch] = threading.current_thread()
        if epoch == 1:
            second.set()
        return plan_epoch(*arguments, epoch=epoch, **more)

    monkeypatch.setattr(module, "plan_epoch", plan)
    schedule = Schedule(tiny_config.optim, manifest.images)
    parts = rank_slices(manifest, tiny_config, schedule, Ranks(), 0, schedule.total_steps)
    next(parts)  # of three in the first epoch
    assert second.wait(60)
    assert len(list(parts)) == 5
    assert sorted(planned) == [0, 1], "an epoch that is never read was planned"
    assert threading.current_thread() not in planned.values()


def test_the_plan_knows_the_sizes_that_images_are_going_to_have(manifest: Manifest) -> None:
    config, index = TransformConfig(), manifest.index()
    rows = np.arange(12)
    epochs = rows % 3
    found = augmented_sizes(index, 7, config)(rows, epochs)
    for row, epoch, size in zip(rows.tolist(), epochs.tolist(), zip(*found, strict=True), strict=True):
        image = index.images[row]
        width, height = int(image["width"]), int(image["height"])
        assert draw_geometry(7, epoch, int(image["image_id"]), width, height, config).size == size
