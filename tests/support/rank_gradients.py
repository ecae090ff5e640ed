"""The gradient of one step that several ranks share."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from detr.batch import collate
from pipeline.config import RunConfig
from pipeline.distributed.parallel import Strategy, distribute, unwrap
from pipeline.distributed.ranks import Ranks
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.support.ranks import on_two_nodes
from tests.support.step_samples import CONFIG, UNEVEN, samples

EVEN = (2,) * 8
FEW = (0, 0, 0, 1, 0, 0, 0, 0)  # fewer boxes than ranks
CASES = (EVEN, UNEVEN, FEW)

Gradients = tuple[dict[str, Tensor], float]
"""Every parameter's gradient after a step, and the total loss."""


def gradients(
    ranks: Ranks,
    shares: list[tuple[int, ...]],
    boxes: tuple[int, ...],
    config: RunConfig = CONFIG,
    passes: int = 1,
    strategy: Strategy = "ddp",
) -> Gradients:
    """Return every parameter's gradient after a step in which rank r has the images `shares[r]`, and the total loss.

    `passes` is the number of micro-batches of a rank.
    """
    torch.manual_seed(0)
    model = build_trainable_model(config, 4)
    wrapped = distribute(model, on_two_nodes(ranks), strategy)
    optimizer = build_optimizer(unwrap(wrapped), config.optim)
    made, mine = samples(boxes), shares[ranks.rank]
    cuts = [len(mine) * number // passes for number in range(passes + 1)]
    batches = [collate([made[i] for i in mine[start:stop]]) for start, stop in pairwise(cuts)]
    result = train_step(wrapped, batches, optimizer, config, ranks, step=0)
    parameters = unwrap(wrapped).named_parameters()
    found = {name: whole_tensor(p.grad).clone() for name, p in parameters if p.grad is not None}
    return found, float(ranks.sum(result.losses.total.detach()) / ranks.world_size)


def whole_tensor(value: Tensor) -> Tensor:
    """Return a tensor with the slices of all ranks."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def evenly(world_size: int) -> list[tuple[int, ...]]:
    """Return the eight images, divided evenly among the ranks."""
    each = 8 // world_size
    return [tuple(range(rank * each, (rank + 1) * each)) for rank in range(world_size)]


def assert_equal(found: Gradients, expected: Gradients, atol: float = 1e-5) -> None:
    """Check that gradients and losses are equal up to rounding."""
    assert found[0].keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-5, atol=atol, msg=name)
    assert found[1] == pytest.approx(expected[1], abs=atol)


def all_gradients(ranks: Ranks, shares: list[tuple[int, ...]]) -> list[Gradients]:
    """Return the gradients of each case, computed without micro-batches."""
    return [gradients(ranks, shares, boxes) for boxes in CASES]
