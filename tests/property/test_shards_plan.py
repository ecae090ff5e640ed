"""The plan's promises, for any data set, batch size, seed and number of ranks."""

from types import SimpleNamespace
from typing import cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.manifest import Manifest
from shards.plan import EpochPlan, first_step, plan_epoch

images = st.integers(1, 60)
batch_sizes = st.integers(1, 80)
seeds = st.integers(-(2**63), 2**63)
epochs_of_a_run = st.integers(1, 5)
world_sizes = st.integers(1, 64)


def plans_of_a_run(count: int, batch_size: int, seed: int, epochs: int) -> list[EpochPlan]:
    manifest = cast(Manifest, SimpleNamespace(images=count))  # the plan depends on nothing else
    return [
        plan_epoch(manifest, seed=seed, epoch=epoch, batch_size=batch_size, epochs=epochs) for epoch in range(epochs)
    ]


def stream(plans: list[EpochPlan], world_size: int, from_step: int = 0) -> list[tuple[int, int]]:
    """(row, epoch) of all samples in order, put together from the ranks' parts of each step."""
    samples = []
    for plan in plans:
        for step in range(max(plan.first_step, from_step), plan.end_step):
            for rank in range(world_size):
                samples += list(zip(*(part.tolist() for part in plan.step(step, rank, world_size)), strict=True))
    return samples


@settings(deadline=None)
@given(images, batch_sizes, seeds, epochs_of_a_run)
def test_every_epoch_shows_each_image_exactly_once(count, batch_size, seed, epochs):
    samples = stream(plans_of_a_run(count, batch_size, seed, epochs), 1)
    for epoch in range(epochs):
        assert sorted(row for row, of in samples if of == epoch) == list(range(count))
    assert len(samples) == epochs * count
    assert [epoch for _, epoch in samples] == sorted(epoch for _, epoch in samples)


@settings(deadline=None)
@given(images, batch_sizes, batch_sizes, seeds, epochs_of_a_run, world_sizes, world_sizes)
def test_the_stream_is_the_same_for_any_ranks_and_batch_size(count, batch, other, seed, epochs, world, other_world):
    first = stream(plans_of_a_run(count, batch, seed, epochs), world)
    assert first == stream(plans_of_a_run(count, other, seed, epochs), other_world)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), batch_sizes, seeds)
def test_the_stream_is_the_same_for_every_number_of_ranks_up_to_64(count, batch_size, seed):
    plans = plans_of_a_run(count, batch_size, seed, 2)
    expected = stream(plans, 1)
    assert all(stream(plans, world_size) == expected for world_size in range(2, 65))


@settings(deadline=None)
@given(images, batch_sizes, seeds, epochs_of_a_run, world_sizes, st.data())
def test_a_run_goes_on_at_any_step_on_any_number_of_ranks(count, batch_size, seed, epochs, world_size, data):
    total = first_step(epochs, count, batch_size)
    stop = data.draw(st.integers(0, total))
    whole = stream(plans_of_a_run(count, batch_size, seed, epochs), 1)
    resumed = stream(plans_of_a_run(count, batch_size, seed, epochs), world_size, from_step=stop)
    assert resumed == whole[stop * batch_size :]


@settings(deadline=None)
@given(images, batch_sizes, epochs_of_a_run)
def test_steps_are_numbered_without_gaps_and_all_full_but_the_last(count, batch_size, epochs):
    plans = plans_of_a_run(count, batch_size, 0, epochs)
    steps = [step for plan in plans for step in range(plan.first_step, plan.end_step)]
    assert steps == list(range(first_step(epochs, count, batch_size)))
    sizes = [plan.samples(step) for plan in plans for step in range(plan.first_step, plan.end_step)]
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert 1 <= sizes[-1] <= batch_size


@settings(deadline=None)
@given(images, batch_sizes, world_sizes)
def test_ranks_share_a_step_evenly(count, batch_size, world_size):
    (plan,) = plans_of_a_run(count, batch_size, 0, 1)
    for step in range(plan.first_step, plan.end_step):
        sizes = [len(plan.step(step, rank, world_size)[0]) for rank in range(world_size)]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(images, batch_sizes, seeds)
def test_sorting_within_steps_moves_no_sample_to_another_step(count, batch_size, seed):
    manifest = cast(Manifest, SimpleNamespace(images=count))
    plain = plan_epoch(manifest, seed=seed, epoch=0, batch_size=batch_size)
    ordered = plan_epoch(
        manifest, seed=seed, epoch=0, batch_size=batch_size, sort_keys=lambda rows, epochs: np.asarray(rows % 3)
    )
    for step in range(plain.first_step, plain.end_step):
        members = [sorted(zip(*plan.step(step), strict=True)) for plan in (plain, ordered)]
        assert members[0] == members[1]
        assert (np.diff(ordered.step(step)[0] % 3) >= 0).all()
