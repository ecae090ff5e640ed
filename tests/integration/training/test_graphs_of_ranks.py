"""Two ranks, one of which replays while the other does not, train as with DDP."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from detr.batch import collate
from pipeline.data.canvases import Canvas, ChosenCanvases
from pipeline.distributed.parallel import distribute, unwrap
from pipeline.distributed.ranks import Ranks
from pipeline.training.graphs.passes import Graphs
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.support.ranks import run_ranks
from tests.support.repeated import RepeatedWork
from tests.support.step_samples import CONFIG, UNEVEN, samples

CLIPPED = replace(CONFIG, optim=replace(CONFIG.optim, clip_norm=0.1))
SHARES = ((0, 1, 2), (3, 4, 5, 6, 7))


def trained(ranks: Ranks, graphed: bool) -> tuple[list[float], torch.Tensor]:
    """Return the total losses of three steps of two passes, and all weights."""
    torch.manual_seed(ranks.rank)  # rank 0's weights are the model's
    model = distribute(build_trainable_model(CLIPPED, 4), ranks, "ddp", graphs=graphed).train()
    graphs = None
    if graphed:
        chosen = ChosenCanvases((Canvas(2, 64, 64),), 1, 1, 1.0, 0)  # only rank 1 has passes of two images
        graphs = Graphs(model, chosen, CLIPPED, ranks, RepeatedWork())
    optimizer = build_optimizer(unwrap(model), CLIPPED.optim)
    data, mine = samples(UNEVEN), SHARES[ranks.rank]
    cuts = (0, 3, 5) if ranks.rank else (0, 3, 3)
    batches = [collate([data[i] for i in mine[start:stop]]) for start, stop in pairwise(cuts)]
    losses = []
    for step in range(3):
        result = train_step(model, batches, optimizer, CLIPPED, ranks, step, graphs=graphs)
        losses.append(float(ranks.sum(result.losses.total.detach().clone())))
    if graphs:
        assert graphs.read_hit_rate() == (0.5 if ranks.rank else 0.0)
    return losses, torch.cat([value.flatten() for value in unwrap(model).state_dict().values()])


def both(ranks: Ranks) -> list[tuple[list[float], torch.Tensor]]:
    return [trained(ranks, graphed) for graphed in (False, True)]


def test_graphs_on_one_of_two_ranks_give_the_losses_and_weights_of_ddp() -> None:
    of_ranks = run_ranks(2, both)
    (expected, weights), (losses, found) = of_ranks[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(of_ranks[1][1][1], found)
