"""A worker's model and optimizer, restored from the newest checkpoint or from the run's initial weights."""

from __future__ import annotations

import torch

from detr.execution import compile_shapes, set_channels_last, set_recompute
from detr.model import DETR
from pipeline import checkpoint
from pipeline.checkpoint_store import Location
from pipeline.config import RunConfig
from pipeline.ema import Ema
from pipeline.optim import build_optimizer
from pipeline.parallel import distribute, unwrap
from pipeline.state import State, Worker
from pipeline.weights import build_trained, read_initial


def restore(worker: Worker, newest: Location | None, step: int) -> State:
    """Return the state after `step` steps, from the checkpoint `newest` or, if None, from the initial weights.

    A collective call.
    """
    config, ranks = worker.config, worker.ranks
    torch.manual_seed(config.seed)
    model = build(config, worker.train.num_classes, ranks.device)
    if newest is None:
        read_initial(model, worker.place.folder)
    if config.compute.compile:
        compile_shapes(model)
    wrapped = distribute(model, ranks, config.cluster.strategy)
    optimizer = build_optimizer(unwrap(wrapped), config.optim)
    ema = Ema(wrapped, config.optim.ema) if config.optim.ema else None
    if newest is not None:
        checkpoint.load(newest, wrapped, optimizer, ranks, ema.averages if ema else None)
    wrapped.train()
    return State(wrapped, optimizer, step, ema)


def build(config: RunConfig, num_classes: int, device: torch.device) -> DETR:
    """Return the run's model on a device, not yet wrapped for several workers."""
    compute = config.compute
    model = build_trained(config, num_classes).to(device)
    if compute.channels_last:
        set_channels_last(model)
    set_recompute(model, compute.recompute)
    return model
