import hashlib
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from shards.config import PlanConfig
from shards.dataset.manifest import Manifest
from shards.errors import ShardError
from shards.hashing import hashes, splitmix64
from shards.plan import epoch as epoch_plan
from shards.plan.epoch import PLAN_VERSION, epoch_order, plan_epoch, plan_evaluation, shard_blocks
from shards.plan.steps import Steps


def by_row(rows, epochs):
    """Return squares that grow with the row and the epoch."""
    sides = 100 + 10 * rows + 100 * epochs
    return sides, sides


def test_splitmix64_gives_the_published_numbers():
    # The first outputs of the reference generator seeded with 1234567.
    states = np.array([1234567], np.uint64) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_never_changes():
    # Any change here makes resumed runs see other images than they would have.
    assert epoch_order(0, 0, 10).tolist() == [0, 9, 1, 6, 3, 5, 4, 2, 8, 7]
    assert epoch_order(42, 7, 10).tolist() == [4, 8, 7, 1, 2, 0, 6, 5, 9, 3]


def test_order_of_blocks_and_window_steps_never_changes(coco):
    assert shard_blocks(42, 3, 10, 4).tolist() == [1, 2, 1, 0, 0, 2, 1, 1, 0, 0]
    manifest = coco.write(samples_per_shard=2)
    config = PlanConfig(sort_window=2, shuffle_shards=2, epoch_tail="short")
    plan = plan_epoch(manifest, seed=42, epoch=3, batch_size=2, config=config, sizes=by_row)
    assert [plan.step(step)[0].tolist() for step in range(plan.first_step, plan.end_step)] == [
        [6, 5],
        [1, 0],
        [4, 3],
        [2],
    ]


def like_photographs(rows, epochs):
    """Return sizes that depend on hashes alone."""
    drawn = hashes((5,), rows + 1000 * epochs)
    return (400 + drawn % np.uint64(400)).astype(np.int64), (480 + drawn // np.uint64(400) % np.uint64(800)).astype(
        np.int64
    )


def a_large_plan():
    manifest = cast(Manifest, SimpleNamespace(images=40_000))
    config = PlanConfig(sort_window=4)
    return plan_epoch(manifest, seed=7, epoch=1, batch_size=160, config=config, sizes=like_photographs)


def test_order_of_a_large_epoch_never_changes():
    """Use an epoch and steps larger than the blocks of sorting and pairing; a change needs another PLAN_VERSION."""
    assert PLAN_VERSION == 1
    digest = hashlib.sha256(a_large_plan().rows.astype("<i8").tobytes()).hexdigest()
    assert digest == "1b0923a5e0ccda9626a870c2471105a74d22196602ad2d234f41963db1cbc0cf"


def test_block_size_of_sorting_does_not_change_the_order(monkeypatch):
    expected = a_large_plan()
    for at_once in (1, 5000, 1 << 20):
        monkeypatch.setattr(epoch_plan, "_SORTED_AT_ONCE", at_once)
        assert np.array_equal(a_large_plan().rows, expected.rows)


def test_seed_and_epoch_are_not_interchangeable():
    assert epoch_order(1, 2, 50).tolist() != epoch_order(2, 1, 50).tolist()
    assert hashes((0, 1), [5])[0] != hashes((1, 0), [5])[0]


def test_negative_and_huge_seeds_work():
    for seed in (-1, 2**63, 2**64 + 3):
        assert sorted(epoch_order(seed, 0, 20).tolist()) == list(range(20))


def test_a_step_may_straddle_epochs_and_the_last_is_cut(coco):
    manifest = coco.write()  # 7 images
    plans = [plan_epoch(manifest, seed=0, epoch=epoch, batch_size=4, epochs=3) for epoch in range(3)]
    assert [(plan.first_step, plan.end_step) for plan in plans] == [(0, 2), (2, 4), (4, 6)]
    assert plans[0].step(1)[1].tolist() == [0, 0, 0, 1]
    assert plans[2].samples(5) == 1  # 3 * 7 = 21 = 5 * 4 + 1
    assert Steps(7, 4).at(3 * 7) == 6


def test_without_a_last_epoch_every_step_is_full(coco):
    manifest = coco.write()
    plan = plan_epoch(manifest, seed=0, epoch=2, batch_size=4)
    assert [plan.samples(step) for step in range(plan.first_step, plan.end_step)] == [4, 4]


def test_a_batch_may_be_larger_than_the_data_set(coco):
    manifest = coco.write()
    plans = [plan_epoch(manifest, seed=0, epoch=epoch, batch_size=16, epochs=3) for epoch in range(3)]
    assert [len(plan) for plan in plans] == [1, 0, 1]
    assert plans[0].step(0)[1].tolist() == [0] * 7 + [1] * 7 + [2] * 2
    assert plans[2].samples(1) == 5


def test_ranks_without_samples_get_an_empty_slice(coco):
    plan = plan_epoch(coco.write(), seed=0, epoch=0, batch_size=3, epochs=1)
    sizes = [len(plan.step(2, rank, 4)[0]) for rank in range(4)]
    assert sizes == [0, 0, 0, 1]


def test_similar_shapes_are_put_together_within_their_step(coco):
    manifest = coco.write()
    plain = plan_epoch(manifest, seed=3, epoch=0, batch_size=4)
    ordered = plan_epoch(manifest, seed=3, epoch=0, batch_size=4, sizes=by_row)
    for step in range(2):
        rows = sorted(plain.step(step)[0].tolist())
        assert sorted(ordered.step(step)[0].tolist()) == rows
        assert ordered.step(step)[0].tolist() == [rows[3], rows[2], rows[1], rows[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sort_window": 0}, "got sort_window 0"),
        ({"shuffle_shards": -1}, "shuffle_shards -1"),
        ({"epoch_tail": "drop"}, "got epoch_tail 'drop', expected straddle or short"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ShardError, match=message):
        PlanConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "epoch": 0}, "got batch_size 0"),
        ({"batch_size": 1, "epoch": -1}, "got epoch -1"),
        ({"batch_size": 1, "epoch": 3, "epochs": 3}, "got epoch 3, expected 0 <= epoch < 3"),
    ],
)
def test_impossible_plans_are_refused(coco, arguments, message):
    with pytest.raises(ShardError, match=message):
        plan_epoch(coco.write(), seed=0, **arguments)


def test_steps_and_ranks_outside_the_plan_are_refused(coco):
    plan = plan_epoch(coco.write(), seed=0, epoch=1, batch_size=4)
    with pytest.raises(ShardError, match="got step 1, expected a step of epoch 1: 2 <= step < 4"):
        plan.step(1)
    with pytest.raises(ShardError, match="got rank 2 of 2"):
        plan.step(2, 2, 2)


def test_evaluation_batches_group_similar_shapes(coco):
    manifest = coco.write()
    batches = plan_evaluation(manifest, batch_size=3)
    assert [len(batch) for batch in batches] == [3, 3, 1]
    rows = np.concatenate(batches)
    assert sorted(rows.tolist()) == list(range(7))
    images = manifest.index().images[rows]
    assert (np.diff(images["width"] / images["height"]) >= 0).all()
    with pytest.raises(ShardError, match="got batch_size 0"):
        plan_evaluation(manifest, batch_size=0)


def test_evaluation_batches_of_known_sizes_start_with_the_largest(coco):
    manifest = coco.write()
    heights, widths = np.array([8, 9, 8, 8, 9, 8, 8]), np.array([9, 8, 9, 9, 8, 8, 9])
    batches = plan_evaluation(manifest, batch_size=3, sizes=(heights, widths))
    assert [batch.tolist() for batch in batches] == [[0, 2, 3], [6], [1, 4], [5]]
    few = plan_evaluation(manifest, batch_size=3, sizes=(heights, widths), limit=5)
    assert [batch.tolist() for batch in few] == [[0, 2, 3], [6], [1]]
    assert [len(batch) for batch in plan_evaluation(manifest, batch_size=3, limit=5)] == [3, 2]
