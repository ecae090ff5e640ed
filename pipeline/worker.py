"""The training loop of one worker: from the newest checkpoint, or the first weights, to the last step.

It knows neither Ray nor MLflow: ranks, folder and tracker are passed in, so the same loop runs in a unit test, in one
process, and on a cluster. The run's position is one number, the step; the plan, the schedule and the augmentation are
functions of it. The loop has one shape for a fresh, an interrupted and a finished run:

    evaluate if due -> stop if done -> train to the next boundary -> save -> (again)

A kill between saving and evaluating therefore costs nothing: the evaluation is still due when the run goes on.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from detr.batch import Batch
from detr.execution import compile_shapes, set_channels_last, set_recompute, uncompiled
from detr.model import DETR
from pipeline import checkpoint
from pipeline.config import RunConfig
from pipeline.data import check_cache, open_data
from pipeline.evaluate import evaluate
from pipeline.guard import Guard
from pipeline.identity import continuation
from pipeline.meter import Meter
from pipeline.optim import Schedule, build_optimizer, set_learning_rates
from pipeline.parallel import Ranks, distribute, unwrap, whole
from pipeline.samples import training_batches
from pipeline.saving import Saver, open_saver
from pipeline.step import Diverged, train_step
from pipeline.stopping import StopWatch
from pipeline.telling import tell_evaluation, tell_left_out, tell_pictures
from pipeline.track import TAG_PHASE, Tracker
from pipeline.weights import build_trained, read_initial
from shards.detections import Detections
from shards.manifest import Manifest
from shards.plan import PLAN_VERSION


@dataclass(frozen=True)
class Place:
    """Which run this is: its id, its folder (seen by every worker) and the commit of the code."""

    run_id: str
    folder: Path
    code_commit: str
    accept_change: bool = False
    """Go on from a checkpoint of another stream of samples; see `pipeline/identity.py`."""


@dataclass
class State:
    """The one mutable thing: model, optimizer, and how many optimizer steps they have taken."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int


@dataclass(frozen=True)
class Worker:
    """A worker's unchanging surroundings."""

    config: RunConfig
    place: Place
    ranks: Ranks
    tracker: Tracker | None
    """Only on rank 0."""
    train: Manifest
    val: Manifest
    schedule: Schedule


@dataclass(frozen=True)
class Means:
    """What steps are taken with: batches, what handles a bad one, and whether this rank is asked to stop."""

    batches: Iterator[tuple[Batch, ...]]
    guard: Guard
    asked: Callable[[], bool]


def run(config: RunConfig, place: Place, ranks: Ranks, tracker: Tracker | None) -> None:
    """Train until the last step, or until asked to stop, whatever was done before; a collective call."""
    train, val = open_data(config.data)
    check_cache(config.data, train, val)
    # Rank 0 decides for all: another rank could look a moment later, or at a folder that is not yet in sync.
    newest = ranks.gather(checkpoint.newest(place.folder))[0]
    meta = None if newest is None else checkpoint.read_meta(newest)
    origin = continuation(meta, config, train, place.accept_change).origin
    schedule = Schedule(config.optim, train.images, config.data.epoch_tail, origin)
    worker = Worker(config, place, ranks, tracker, train, val, schedule)
    state = _restore(worker, newest, 0 if meta is None else meta.step)
    if state.step == 0 and tracker:
        # MLflow's slider opens at step 0: show there what is to be found.
        tell_pictures(tracker, val, Detections.empty(config.model.masks), config.evaluate.pictures, 0)
    # One stream to the end: neither checkpoints nor evaluations nor ends of epochs stop its threads.
    with (
        closing(training_batches(train, config, schedule, ranks, state.step, schedule.total_steps)) as batches,
        open_saver(place.folder, state.optimizer, ranks, config.checkpoint.keep) as saver,
    ):
        asked = StopWatch(place.folder).asked if ranks.first else bool
        means = Means(batches, Guard(place.folder, config.guard, ranks, tracker, saver), asked)
        while True:
            if state.step and _evaluation_due(worker, state.step):
                _evaluate(worker, state, saver)
            if state.step >= schedule.total_steps:
                return
            stop = _train(worker, state, means, until=_next_boundary(worker, state.step))
            _save(worker, state, saver)
            if stop:
                return


def _restore(worker: Worker, newest: Path | None, step: int) -> State:
    config, ranks = worker.config, worker.ranks
    torch.manual_seed(config.seed)
    model = _build(worker)
    if newest is None:
        read_initial(model, worker.place.folder)
    if config.compute.compile:
        compile_shapes(model)
    wrapped = distribute(model, ranks, config.cluster.strategy)
    optimizer = build_optimizer(unwrap(wrapped), config.optim)
    if newest is not None:
        checkpoint.load(newest, wrapped, optimizer, ranks)
    wrapped.train()
    return State(wrapped, optimizer, step)


def _build(worker: Worker) -> DETR:
    compute = worker.config.compute
    model = build_trained(worker.config, worker.train.num_classes).to(worker.ranks.device)
    if compute.channels_last:
        set_channels_last(model)
    set_recompute(model, compute.recompute)
    return model


def _next_evaluation(worker: Worker, step: int) -> int:
    """The first step after `step` at which an evaluation is due."""
    schedule, every = worker.schedule, worker.config.evaluate.every
    epoch = int(schedule.epoch(step)) // every * every
    while schedule.steps(epoch) <= step:
        epoch += every
    return min(schedule.steps(epoch), schedule.total_steps)


def _next_boundary(worker: Worker, step: int) -> int:
    every = worker.config.checkpoint.every_steps
    nearest = _next_evaluation(worker, step)
    return min(nearest, (step // every + 1) * every) if every else nearest


def _evaluation_due(worker: Worker, step: int) -> bool:
    """True at the end of every `evaluate.every` epochs and of the run, unless this checkpoint has its figures."""
    if _next_evaluation(worker, step - 1) != step:
        return False
    path = checkpoint.folder_of(worker.place.folder, step)
    return worker.ranks.gather(checkpoint.read_evaluation(path) is None)[0] is True


def _train(worker: Worker, state: State, means: Means, until: int) -> bool:
    """Take the steps before `until`; true where the run is asked to stop, perhaps earlier."""
    schedule = worker.schedule
    meter = Meter(schedule, worker.ranks, worker.tracker)
    stop = False
    while state.step < until and not stop:
        micro_batches = next(means.batches)
        waited = meter.waited()
        set_learning_rates(state.optimizer, schedule.factor(state.step))
        try:
            result = train_step(
                state.model, micro_batches, state.optimizer, worker.config, worker.ranks, state.step, means.asked()
            )
            meter.add(result, schedule.samples(state.step + 1) - schedule.samples(state.step), waited)
            stop = result.stop
        except Diverged as event:
            means.guard.handle(event, state.model, state.optimizer)
        state.step += 1
        if state.step % worker.config.track.log_every == 0 or state.step == until or stop:
            meter.tell(state.step, state.optimizer)
    return stop


def _save(worker: Worker, state: State, saver: Saver) -> None:
    config = worker.config
    meta = checkpoint.Meta(
        step=state.step,
        epoch=worker.schedule.epoch(state.step),
        samples=worker.schedule.samples(state.step),
        run_id=worker.place.run_id,
        seed=config.seed,
        batch_size=config.optim.batch_size,
        train_digest=worker.train.digest,
        num_classes=worker.train.num_classes,
        code_commit=worker.place.code_commit,
        world_size=worker.ranks.world_size,
        versions={name: importlib.metadata.version(name) for name in ("torch", "torchvision", "numpy")},
        sort_window=config.data.sort_window,
        shuffle_shards=config.data.shuffle_shards,
        epoch_tail=config.data.epoch_tail,
        origin_step=worker.schedule.origin.step,
        origin_samples=worker.schedule.origin.samples,
        plan_version=PLAN_VERSION,
    )
    saver.save(state.model, state.optimizer, meta)
    if config.data.max_bad_samples:
        tell_left_out(worker.tracker, worker.train, worker.ranks)


def _evaluate(worker: Worker, state: State, saver: Saver) -> None:
    config, tracker = worker.config, worker.tracker
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if tracker:
            tracker.tags({TAG_PHASE: f"evaluating {done * 100 // max(total, 1)}%"})

    if tracker:
        tracker.tags({TAG_PHASE: "evaluating"})
    with uncompiled():  # its canvases have any shape, each of which would be compiled
        evaluation = evaluate(
            whole(state.model, lambda: _build(worker)),
            worker.val,
            worker.train.categories,
            transform=config.transform,
            batch_size=config.evaluate.batch_size,
            ranks=worker.ranks,
            threads=config.data.reader_threads,
            limit=config.evaluate.limit,
            progress=progress,
        )
    saver.finish()  # its figures are noted beside it
    if evaluation is not None:
        path = checkpoint.folder_of(worker.place.folder, state.step)
        if tracker:
            tell_evaluation(tracker, path, state.step, worker.schedule.epoch(state.step), evaluation, start)
            tell_pictures(tracker, worker.val, evaluation.detections, config.evaluate.pictures, state.step)
            tracker.tags({TAG_PHASE: "training"})
        # Told first, noted last: a kill between the two repeats what is then dropped as told before.
        checkpoint.write_evaluation(path, evaluation.score.metrics)
        checkpoint.prune(worker.place.folder, config.checkpoint.keep)
    worker.ranks.barrier()
