"""A worker's model and optimizer, restored from the newest checkpoint or from the run's initial weights."""

from __future__ import annotations

import msgspec
import torch

from detr.compute import compile_shapes
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.metadata import Meta
from pipeline.checkpoint.patience import patiently
from pipeline.checkpoint.visibility import check_seen
from pipeline.config import to_json
from pipeline.distributed.parallel import distribute, unwrap
from pipeline.schedule import is_evaluated, is_milestone
from pipeline.tracking.provenance import library_versions
from pipeline.training.ema import Ema
from pipeline.training.graphs.planned import planned_graphs
from pipeline.training.model import build_on_device, read_initial
from pipeline.training.optim import build_optimizer
from pipeline.training.state import TrainState, WorkerContext
from pipeline.training.step import RANDOMNESS
from shards.plan.epoch import PLAN_VERSION


def restore(worker: WorkerContext, newest: Location | None, step: int) -> TrainState:
    """Return the state after `step` steps, from the checkpoint `newest` or, if None, from the initial weights.

    A collective call.
    """
    config, ranks = worker.config, worker.ranks
    torch.manual_seed(config.seed)
    model = build_on_device(config, worker.train.num_classes, ranks.device)
    if newest is None:
        read_initial(model, worker.run_info.folder, ranks)
    if config.compute.compile:
        compile_shapes(model)
    # Which nodes hold the workers is the user's choice at the start alone: a run that continues takes what is left.
    uneven = newest is not None or config.cluster.fewest < config.cluster.workers
    wrapped = distribute(model, ranks, config.cluster.strategy, uneven=uneven, graphs=config.compute.graphs)
    optimizer = build_optimizer(unwrap(wrapped), config.optim)
    ema = Ema(wrapped, config.optim.ema) if config.optim.ema else None
    if newest is not None:
        check_seen(newest, ranks)
        averages = ema.averages if ema else None
        patiently(ranks, lambda: checkpoint_state.load(newest, wrapped, optimizer, ranks, averages))
    wrapped.train()
    graphs = planned_graphs(model, worker, step) if config.compute.graphs else None
    return TrainState(wrapped, optimizer, step, ema, graphs)


def checkpoint_metadata(worker: WorkerContext, step: int) -> Meta:
    """Return the metadata of the checkpoint of `step`, without `best` and `state_folder`, which the writer adds."""
    config, schedule = worker.config, worker.schedule
    return Meta(
        step=step,
        epoch=schedule.epoch(step),
        samples=schedule.samples(step),
        run_id=worker.run_info.run_id,
        config=msgspec.json.decode(to_json(config)),
        train_digest=worker.train.digest,
        num_classes=worker.train.num_classes,
        code_commit=worker.run_info.code_commit,
        world_size=worker.ranks.world_size,
        versions=library_versions(),
        origin_step=schedule.origin.step,
        origin_samples=schedule.origin.samples,
        plan_version=PLAN_VERSION,
        val_digest=worker.val.digest,
        total_steps=schedule.total_steps,
        lr_factor=schedule.factor(step),
        randomness=RANDOMNESS,
        milestone=is_milestone(config, schedule, step),
        evaluate=config.evaluate.asynchronous and is_evaluated(config, schedule, step),
    )
