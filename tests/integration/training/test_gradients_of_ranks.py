"""The gradient is that of the global batch, however many real processes share it."""

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from pipeline.distributed.parallel import Strategy
from pipeline.distributed.ranks import Ranks
from shards.config import PlanConfig
from shards.dataset.manifest import Manifest
from shards.plan.epoch import plan_epoch
from tests.support.rank_gradients import CASES, Gradients, all_gradients, assert_equal, evenly, gradients
from tests.support.ranks import run_ranks
from tests.support.step_samples import CONFIG, MODEL

SHORT = (1, 2, 0, 3, 1, 0, 4, 2, 1, 1, 0, 5, 2)
# The same with a mask head, which needs 128 channels and 8 heads; and with that head alone being trained.
MASKS = replace(CONFIG, model=replace(MODEL, masks=True, hidden_dim=128, heads=8))
HEAD = replace(MASKS, optim=replace(MASKS.optim, train="mask_head"))


def gradients_with_masks(ranks: Ranks, shares: list[tuple[int, ...]]) -> list[Gradients]:
    return [gradients(ranks, shares, boxes, config) for config in (MASKS, HEAD) for boxes in CASES]


@pytest.fixture(scope="module")
def alone() -> list[Gradients]:
    """Return the gradients of one process with all eight images."""
    return all_gradients(Ranks(), evenly(1))


@pytest.mark.parametrize(
    "shares",
    [evenly(2), evenly(4), [(0, 1, 2), (), (3, 4, 5, 6, 7)]],
    ids=["2x4", "4x2", "3, one of them without images"],
)
def test_the_gradient_of_several_ranks_is_that_of_one(shares: list[tuple[int, ...]], alone: list[Gradients]) -> None:
    for found_by_rank in run_ranks(len(shares), all_gradients, shares):
        for found, expected in zip(found_by_rank, alone, strict=True):
            assert_equal(found, expected)


def accumulated_gradients(
    ranks: Ranks, shares: list[tuple[int, ...]], passes: int, strategy: Strategy
) -> list[Gradients]:
    return [gradients(ranks, shares, boxes, passes=passes, strategy=strategy) for boxes in CASES]


@pytest.mark.parametrize(
    ("shares", "passes", "strategy"),
    [
        (evenly(1), 4, "ddp"),
        (evenly(2), 2, "ddp"),
        (evenly(2), 2, "fsdp"),
        ([(0, 1, 2, 3, 4, 5), (6,), (7,)], 3, "fsdp"),
        ([(0, 1, 2, 3), (4, 5), (6,), (7,)], 2, "hsdp"),
    ],
    ids=[
        "1x(4x2)",
        "2x(2x2)",
        "2x(2x2), fsdp",
        "3x3, fsdp, some passes without images",
        "2 nodes x2x2, hsdp, some passes without images",
    ],
)
def test_the_gradient_of_micro_batches_is_that_of_one_pass(
    shares: list[tuple[int, ...]], passes: int, strategy: Strategy, alone: list[Gradients]
) -> None:
    for found_by_rank in run_ranks(len(shares), accumulated_gradients, shares, passes, strategy):
        for found, expected in zip(found_by_rank, alone, strict=True):
            assert_equal(found, expected)


@pytest.mark.parametrize("shares", [evenly(2), [(0, 1, 2), (), (3, 4, 5, 6, 7)]], ids=["2x4", "3, one without images"])
def test_the_gradient_of_a_mask_head_is_that_of_one_rank_too(shares: list[tuple[int, ...]]) -> None:
    """With and without the detector's gradients; ranks without a box have a mask head without a mask."""
    expected = gradients_with_masks(Ranks(), evenly(1))
    for found, _ in expected[len(CASES) :]:
        assert {name.split(".")[0] for name in found} == {"bbox_attention", "mask_head"}
        assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-3
    for found_by_rank in run_ranks(len(shares), gradients_with_masks, shares):
        for found, expected_of_case in zip(found_by_rank, expected, strict=True):
            assert_equal(found, expected_of_case, atol=1e-4)  # of gradients up to 150


def test_a_short_step_at_the_end_of_an_epoch_has_the_gradient_of_one_rank() -> None:
    """Of 13 images the second step of eight has five, so two of seven ranks have none."""
    world_size = 7
    manifest = cast(Manifest, SimpleNamespace(images=len(SHORT)))
    plan = plan_epoch(manifest, seed=0, epoch=0, batch_size=8, config=PlanConfig(epoch_tail="short"))
    whole = [tuple(plan.step(1)[0].tolist())]
    shares = [tuple(plan.step(1, rank, world_size)[0].tolist()) for rank in range(world_size)]
    assert sorted(map(len, shares)) == [0, 0, 1, 1, 1, 1, 1]
    expected = gradients(Ranks(), whole, SHORT)
    for found in run_ranks(world_size, gradients, shares, SHORT):
        assert_equal(found, expected)


def test_the_gradients_that_are_compared_are_not_all_but_zero(alone: list[Gradients]) -> None:
    for found, _ in alone:
        assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-2
