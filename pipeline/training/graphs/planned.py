"""CUDA graphs of a run, for the canvases that its plan will have most often."""

from __future__ import annotations

import logging

from torch import nn

from pipeline.data.canvases import choose_canvases
from pipeline.distributed.ranks import on_first
from pipeline.errors import RunConfigError
from pipeline.training.graphs.capture import CudaCapture
from pipeline.training.graphs.passes import Graphs
from pipeline.training.state import WorkerContext

LOG = logging.getLogger(__name__)
HIT_RATE, EXPECTED = "graphs/hit_rate", "graphs/expected_hit_rate"


def planned_graphs(model: nn.Module, worker: WorkerContext, step: int) -> Graphs:
    """Return the graphs of a run that is at `step`, none of them captured yet; a collective call.

    `model` is not wrapped. Report the expected share of passes that replay one. Raise `RunConfigError` without a GPU.
    """
    config, ranks = worker.config, worker.ranks
    if ranks.device.type != "cuda":
        raise RunConfigError(
            f"compute.graphs is True on a worker that trains on {ranks.device.type}; expected a GPU: --compute.no-graphs"
        )
    chosen = on_first(ranks, lambda: choose_canvases(worker.train, config, worker.schedule, ranks.world_size))
    if worker.tracker:
        LOG.info("%s", chosen)
        worker.tracker.metrics({EXPECTED: chosen.hit_rate}, step)
    return Graphs(model, chosen, config, ranks, CudaCapture(ranks.device))
