"""Properties of the plan for any data set, batch size, seed, options and number of ranks."""

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.config import PlanConfig
from shards.dataset.manifest import Manifest
from shards.plan.epoch import EpochPlan, plan_epoch, shard_blocks
from shards.plan.steps import START, Origin, Steps

images = st.integers(1, 60)
batch_sizes = st.integers(1, 80)
seeds = st.integers(-(2**63), 2**63)
epochs_of_a_run = st.integers(1, 5)
world_sizes = st.integers(1, 64)
tails = st.sampled_from(["straddle", "short"])
configs = st.builds(PlanConfig, st.integers(1, 6), st.integers(0, 5), tails)
unsorted = st.builds(PlanConfig, st.just(1), st.integers(0, 5), tails)
PLAIN = PlanConfig()

Sample = tuple[int, int]  # row, epoch


def manifest_of(count: int) -> Manifest:
    """Return the fields of a manifest that the plan depends on: shards of 7 images, the last one shorter."""
    shards = [SimpleNamespace(samples=min(7, count - start)) for start in range(0, count, 7)]
    return cast(Manifest, SimpleNamespace(images=count, shards=shards))


def sizes(rows: np.ndarray, epochs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return 100 + (rows * 31 + epochs * 17) % 11, 100 + (rows * 7 + epochs * 5) % 13


def key(sample: Sample) -> int:
    """Return the key by which the samples of a window are sorted."""
    height, width = (int(side) for side in sizes(*(np.array(value) for value in sample)))
    return width if width >= height else -height


def plans_of_a_run(
    count: int, batch_size: int, seed: int, epochs: int, config: PlanConfig = PLAIN, origin: Origin = START
) -> list[EpochPlan]:
    return [
        plan_epoch(
            manifest_of(count),
            seed=seed,
            epoch=epoch,
            batch_size=batch_size,
            epochs=epochs,
            sizes=sizes,
            config=config,
            origin=origin,
        )
        for epoch in range(epochs)
    ]


def steps_of(plans: list[EpochPlan], world_size: int = 1) -> dict[int, list[Sample]]:
    """Return (row, epoch) of each step's samples in order, joined from the ranks' slices."""
    return {
        step: [
            sample
            for rank in range(world_size)
            for sample in zip(*(values.tolist() for values in plan.step(step, rank, world_size)), strict=True)
        ]
        for plan in plans
        for step in range(plan.first_step, plan.end_step)
    }


def stream(plans: list[EpochPlan], world_size: int = 1, from_step: int = 0) -> list[Sample]:
    steps = steps_of(plans, world_size)
    assert list(steps) == sorted(steps)
    return [sample for step, samples in steps.items() if step >= from_step for sample in samples]


def every(count: int, epochs: int) -> list[Sample]:
    return [(row, epoch) for epoch in range(epochs) for row in range(count)]


@settings(deadline=None)
@given(images, batch_sizes, seeds, epochs_of_a_run, configs, world_sizes)
def test_every_epoch_shows_each_image_exactly_once(count, batch_size, seed, epochs, config, world_size):
    samples = stream(plans_of_a_run(count, batch_size, seed, epochs, config), world_size)
    assert sorted(samples, key=lambda sample: (sample[1], sample[0])) == every(count, epochs)


@settings(deadline=None)
@given(images, batch_sizes, batch_sizes, seeds, epochs_of_a_run, unsorted, world_sizes, world_sizes)
def test_the_stream_is_the_same_for_any_ranks_and_batch_size(
    count, batch, other, seed, epochs, config, world, other_world
):
    def unordered(size: int, ranks: int) -> list[Sample]:
        manifest = manifest_of(count)
        plans = [
            plan_epoch(manifest, seed=seed, epoch=epoch, batch_size=size, epochs=epochs, config=config)
            for epoch in range(epochs)
        ]
        return stream(plans, ranks)

    assert unordered(batch, world) == unordered(other, other_world)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), batch_sizes, seeds, configs)
def test_stream_is_the_same_for_up_to_64_ranks(count, batch_size, seed, config):
    plans = plans_of_a_run(count, batch_size, seed, 2, config)
    expected = steps_of(plans)
    assert all(steps_of(plans, world_size) == expected for world_size in range(2, 65))


@settings(deadline=None)
@given(images, batch_sizes, seeds, epochs_of_a_run, configs, world_sizes, st.data())
def test_run_resumes_at_any_step_on_any_number_of_ranks(count, batch_size, seed, epochs, config, world_size, data):
    total = Steps(count, batch_size, config.epoch_tail).at(epochs * count)
    stop = data.draw(st.integers(0, total))
    uninterrupted = steps_of(plans_of_a_run(count, batch_size, seed, epochs, config))
    resumed = stream(plans_of_a_run(count, batch_size, seed, epochs, config), world_size, from_step=stop)
    assert resumed == [sample for step, samples in uninterrupted.items() if step >= stop for sample in samples]


@settings(deadline=None)
@given(images, batch_sizes, batch_sizes, seeds, epochs_of_a_run, unsorted, st.data())
def test_new_batch_size_continues_with_the_rest_of_the_epoch(count, batch_size, other, seed, epochs, config, data):
    cut = Steps(count, batch_size, config.epoch_tail)
    stop = data.draw(st.integers(0, cut.at(epochs * count)))
    uninterrupted = steps_of(plans_of_a_run(count, batch_size, seed, epochs, config))
    origin = Origin(stop, min(cut.position(stop), epochs * count))
    after = steps_of(plans_of_a_run(count, other, seed, epochs, config, origin))
    assert list(after) == list(range(stop, stop + len(after)))
    shown = Counter(sample for step, samples in uninterrupted.items() if step < stop for sample in samples)
    shown.update(sample for samples in after.values() for sample in samples)
    assert shown == Counter(every(count, epochs))


@settings(deadline=None)
@given(images, batch_sizes, epochs_of_a_run)
def test_steps_have_no_gaps_and_only_the_last_is_short(count, batch_size, epochs):
    steps = steps_of(plans_of_a_run(count, batch_size, 0, epochs))
    assert list(steps) == list(range(Steps(count, batch_size).at(epochs * count)))
    lengths = [len(samples) for samples in steps.values()]
    assert lengths[:-1] == [batch_size] * (len(lengths) - 1)
    assert 1 <= lengths[-1] <= batch_size


@settings(deadline=None)
@given(images, batch_sizes, epochs_of_a_run, st.integers(1, 6))
def test_short_tail_ends_each_epoch_with_a_short_step(count, batch_size, epochs, window):
    steps = steps_of(plans_of_a_run(count, batch_size, 0, epochs, PlanConfig(window, epoch_tail="short")))
    assert list(steps) == list(range(epochs * math.ceil(count / batch_size)))
    for epoch in range(epochs):
        lengths = [len(samples) for samples in steps.values() if {of for _, of in samples} == {epoch}]
        assert lengths == [batch_size] * (count // batch_size) + ([count % batch_size] if count % batch_size else [])


@settings(deadline=None)
@given(images, batch_sizes, tails, st.integers(0, 50), st.integers(0, 200), st.integers(0, 100))
def test_at_returns_the_first_step_from_a_position_on(count, batch_size, tail, first, ahead, step):
    cut = Steps(count, batch_size, tail, Origin(first, ahead))
    starts = [cut.position(first + number) for number in range(step + 2)]
    assert starts[0] == ahead
    assert all(0 < later - start <= batch_size for start, later in pairwise(starts))
    for position in range(starts[-2] + 1, starts[-1] + 1):
        assert cut.at(position) == first + step + 1


@settings(deadline=None)
@given(images, batch_sizes, world_sizes)
def test_ranks_share_a_step_evenly(count, batch_size, world_size):
    (plan,) = plans_of_a_run(count, batch_size, 0, 1)
    for step in range(plan.first_step, plan.end_step):
        lengths = [len(plan.step(step, rank, world_size)[0]) for rank in range(world_size)]
        assert max(lengths) - min(lengths) <= 1


@settings(deadline=None)
@given(images, batch_sizes, seeds, st.integers(1, 6), tails)
def test_sorting_moves_no_sample_out_of_its_window_of_steps(count, batch_size, seed, window, tail):
    manifest, config = manifest_of(count), PlanConfig(window, epoch_tail=tail)
    plain = plan_epoch(manifest, seed=seed, epoch=1, batch_size=batch_size, config=config)
    ordered = plan_epoch(manifest, seed=seed, epoch=1, batch_size=batch_size, config=config, sizes=sizes)
    before, after = steps_of([plain]), steps_of([ordered])
    assert {step: len(samples) for step, samples in before.items()} == {step: len(s) for step, s in after.items()}
    for start in range(plain.first_step, plain.end_step, window):
        members = range(start, min(start + window, plain.end_step))
        assert Counter(s for m in members for s in before[m]) == Counter(s for m in members for s in after[m])
        ranges = [(min(map(key, after[member])), max(map(key, after[member]))) for member in members]
        # The ranges of a window's steps overlap at their ends only: each step has images of similar size.
        ranges.sort()
        assert all(earlier[1] <= later[0] for earlier, later in pairwise(ranges))


@settings(deadline=None)
@given(st.integers(1, 120), seeds, st.integers(0, 9), st.integers(1, 6))
def test_shards_come_in_blocks_and_every_epoch_has_others(count, seed, epoch, per_block):
    manifest = manifest_of(count)
    blocks = shard_blocks(seed, epoch, len(manifest.shards), per_block)
    assert sorted(blocks.tolist()) == [number // per_block for number in range(len(manifest.shards))]
    plan = plan_epoch(
        manifest, seed=seed, epoch=epoch, batch_size=1, config=PlanConfig(shuffle_shards=per_block, epoch_tail="short")
    )
    shown = blocks[plan.rows // 7]
    assert shown.tolist() == sorted(shown.tolist())
