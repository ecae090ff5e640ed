"""Properties of a run's reader: it delivers the plan for any number of threads and ranks and after any stop."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from detr.batch import collate
from pipeline.config import DataConfig, RunConfig
from pipeline.data.loader import augmented_sizes, rank_slices, training_batches, training_transform
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from shards.config import PlanConfig, ReadConfig
from shards.dataset.manifest import Manifest, load_manifest
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader, open_stream
from shards.read.sample import Sample

EPOCHS = 2

batch_sizes = st.integers(1, 30)
world_sizes = st.integers(1, 64)
thread_counts = st.integers(0, 5)
options = st.fixed_dictionaries(
    {
        "sort_window": st.integers(1, 4),
        "shuffle_shards": st.integers(0, 3),
        "epoch_tail": st.sampled_from(["straddle", "short"]),
    }
)


@pytest.fixture(scope="module")
def manifest(tiny_config: RunConfig) -> Manifest:
    return load_manifest(tiny_config.data.train)  # 12 images in three shards


def configured(config: RunConfig, seed: int, batch_size: int, chosen: dict[str, object]) -> RunConfig:
    data = DataConfig(train=config.data.train, val=config.data.val, reader_threads=1, **chosen)  # type: ignore[arg-type]
    return replace(config, seed=seed, data=data, optim=replace(config.optim, batch_size=batch_size, epochs=EPOCHS))


def seen(sample: Sample) -> tuple[int, int]:
    return sample.epoch, sample.image_id


def delivered(
    manifest: Manifest, config: RunConfig, world_size: int, threads: int, first: int = 0, until: int | None = None
) -> list[list[tuple[int, int]]]:
    """Return (epoch, image id) of each step's samples, joined from those that every rank's reader delivers."""
    schedule = Schedule(config.optim, manifest.images, config.data.epoch_tail)
    until = schedule.total_steps if until is None else until
    steps: list[list[tuple[int, int]]] = [[] for _ in range(until - first)]
    for rank in range(world_size):
        slices = rank_slices(manifest, config, schedule, Ranks(rank, world_size), first, until)
        read = ReadConfig(threads=threads, prefetch=max(1, 2 * threads))
        with closing(open_stream(manifest, slices, transform=seen, collate=list, config=read)) as stream:
            for step, samples in zip(steps, stream, strict=True):
                step += samples
    return steps


def planned(manifest: Manifest, config: RunConfig) -> Iterator[list[tuple[int, int]]]:
    """Yield the same from the plans of the single epochs."""
    ids = manifest.index().images["image_id"]
    schedule = Schedule(config.optim, manifest.images, config.data.epoch_tail)
    data = config.data
    for epoch in range(EPOCHS):
        plan = plan_epoch(
            manifest,
            seed=config.seed,
            epoch=epoch,
            batch_size=config.optim.batch_size,
            sizes=augmented_sizes(manifest.index(), config.seed, config.transform),
            config=PlanConfig(data.sort_window, data.shuffle_shards, data.epoch_tail),
        )
        for step in range(plan.first_step, min(plan.end_step, schedule.total_steps)):
            rows, epochs = plan.step(step)
            yield list(zip(epochs.tolist(), ids[rows].tolist(), strict=True))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), batch_sizes, world_sizes, thread_counts, options)
def test_every_epoch_is_delivered_exactly_on_any_ranks_and_threads(
    manifest, tiny_config, seed, batch_size, world_size, threads, chosen
):
    config = configured(tiny_config, seed, batch_size, chosen)
    steps = delivered(manifest, config, world_size, threads)
    assert steps == list(planned(manifest, config))
    count = Counter(sample for step in steps for sample in step)
    assert set(count.values()) == {1}
    ids = manifest.index().images["image_id"].tolist()
    # The last step may be filled up from the epoch after the last, and a window mixes that with the last epoch's.
    surplus = len(count) - EPOCHS * len(ids)
    assert 0 <= surplus < batch_size
    missing = {(epoch, image_id) for epoch in range(EPOCHS) for image_id in ids} - set(count)
    assert not missing


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), batch_sizes, world_sizes, world_sizes, thread_counts, options, st.data())
def test_stopped_run_continues_the_same_on_any_number_of_ranks(
    manifest, tiny_config, seed, batch_size, before, after, threads, chosen, data
):
    config = configured(tiny_config, seed, batch_size, chosen)
    expected = list(planned(manifest, config))
    stop = data.draw(st.integers(0, len(expected)))
    first = delivered(manifest, config, before, threads, until=stop)
    assert first + delivered(manifest, config, after, threads, first=stop) == expected


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 300), st.integers(1, 12))
def test_pixels_and_boxes_do_not_depend_on_the_threads(manifest, tiny_config, seed, epoch, batch_size):
    def batches(threads: int) -> list:
        plan = plan_epoch(manifest, seed=seed, epoch=epoch, batch_size=batch_size)
        transform = training_transform(
            seed, replace(tiny_config.transform, crop=True, crop_scales=(40, 56), crop_range=(24, 50))
        )
        config = ReadConfig(threads=threads, prefetch=4)
        return list(open_loader(manifest, plan, transform=transform, collate=collate, config=config))

    alone = batches(0)
    assert sum(len(batch.targets) for batch in alone) >= 12 - batch_size
    for threads in (1, 4):
        for batch, other in zip(batches(threads), alone, strict=True):
            assert torch.equal(batch.images, other.images)
            assert batch.sizes == other.sizes
            for target, expected in zip(batch.targets, other.targets, strict=True):
                assert target.image_id == expected.image_id
                assert torch.equal(target.boxes, expected.boxes)
                assert torch.equal(target.labels, expected.labels)


def test_stream_over_epochs_equals_the_loaders_of_its_epochs(manifest, tiny_config):
    config = configured(tiny_config, 42, 5, {})
    schedule = Schedule(config.optim, manifest.images)
    ranks = Ranks(1, 2)
    expected = [
        batch
        for epoch in range(EPOCHS)
        for batch in open_loader(
            manifest,
            plan_epoch(
                manifest,
                seed=42,
                epoch=epoch,
                batch_size=5,
                sizes=augmented_sizes(manifest.index(), 42, config.transform),
            ),
            rank=1,
            world_size=2,
            transform=training_transform(42, config.transform),
            collate=collate,
        )
    ]
    found = list(training_batches(manifest, config, schedule, ranks, 0, schedule.total_steps))
    assert len(found) == len(expected) == 5
    for (batch,), other in zip(found, expected, strict=True):
        assert torch.equal(batch.images, other.images)
        assert [target.image_id for target in batch.targets] == [target.image_id for target in other.targets]
