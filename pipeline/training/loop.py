"""Training loop of one worker: from the newest checkpoint, or the initial weights, to the last step.

It uses neither Ray nor MLflow: ranks, folder and tracker are passed in, so the same loop runs in a unit test, in one
process, and on a cluster. The position of a run is one number, the step; the plan, the schedule and the augmentation
are functions of it. New, interrupted and finished runs take the same path through the loop:

    evaluate if due -> stop if done -> train to the next boundary -> save -> (again)

A kill between saving and evaluating therefore costs nothing: the evaluation is still due when the run continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from detr.batch import Batch
from detr.compute import arithmetic
from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location, checkpoint_root
from pipeline.checkpoint.metadata import Meta
from pipeline.checkpoint.patience import patiently
from pipeline.checkpoint.saver import Saver
from pipeline.config import RunConfig
from pipeline.data.datasets import check_cache, open_data
from pipeline.data.loader import training_batches
from pipeline.distributed.ranks import Ranks, on_first
from pipeline.schedule import Schedule, next_boundary
from pipeline.tracking.meter import Meter
from pipeline.tracking.progress import Forecast
from pipeline.tracking.tracker import Tracker
from pipeline.training.checkpointing import checkpoint_metadata, restore
from pipeline.training.continuation import continuation
from pipeline.training.divergence import Diverged
from pipeline.training.explaining import Explainer
from pipeline.training.first_minute import FirstMinute
from pipeline.training.graphs.planned import HIT_RATE
from pipeline.training.guard import Guard
from pipeline.training.optim import learning_rates, set_learning_rates
from pipeline.training.out_of_memory import explaining
from pipeline.training.reporting import report_hardware, report_left_out, report_opening
from pipeline.training.requests import NO_HOOKS, NO_REQUEST, LoopHooks, Request
from pipeline.training.run_report import ReportedRun
from pipeline.training.state import RunInfo, TrainState, WorkerContext
from pipeline.training.step import train_step
from pipeline.training.validation import evaluation_due, validate
from shards.read.bad_samples import BadSamples


@dataclass(frozen=True)
class LoopParts:
    """Collaborators of the loop in each step."""

    batches: Iterator[tuple[Batch, ...]]
    bad: BadSamples
    """Training samples that were skipped because they are damaged."""
    guard: Guard
    """Handles steps that diverge."""
    saver: Saver
    meter: Meter
    poll: Callable[[], Request]
    """Return the requests of the driver and the cluster to this rank."""
    stepped: Callable[[int], None]
    """Called after each step with its number."""

    def request(self) -> Request:
        """Return the polled requests, with a save if the saver needs one."""
        request = self.poll()
        return request._replace(save=request.save or self.saver.due())


def run(
    config: RunConfig, run_info: RunInfo, ranks: Ranks, tracker: Tracker | None, hooks: LoopHooks = NO_HOOKS
) -> None:
    """Train until the last step or a request to stop, from the newest checkpoint; a collective call."""
    with arithmetic(config.compute.tf32, deterministic=config.compute.deterministic):
        _run(config, run_info, ranks, tracker, hooks)


def _run(config: RunConfig, run_info: RunInfo, ranks: Ranks, tracker: Tracker | None, hooks: LoopHooks) -> None:
    train, val = open_data(config.data)
    check_cache(config.data, train, val)
    root = checkpoint_root(config.checkpoint.store, run_info.folder)
    newest, meta = _newest(root, run_info, ranks)
    origin = continuation(meta, config, train, run_info.accept_change).origin
    schedule = Schedule(config.optim, train.images, config.data.epoch_tail, origin)
    worker = WorkerContext(config, run_info, ranks, tracker, train, val, schedule)
    state = restore(worker, newest, 0 if meta is None else meta.step)
    report_hardware(tracker, ranks)
    if state.step == 0 and tracker:
        report_opening(config, tracker, val)
    bad = BadSamples()
    # One stream to the end of the run: checkpoints, evaluations and ends of epochs do not stop its threads.
    with (
        closing(training_batches(train, config, schedule, ranks, state.step, schedule.total_steps, bad)) as batches,
        Saver(
            root,
            state.optimizer,
            ranks,
            config.checkpoint.keep,
            config.checkpoint.every_minutes,
            partial(catalog.note_saved, run_info.folder),
            hooks.keep_unsent,
        ) as saver,
        Explainer(
            tracker,
            val,
            config.evaluate.explain,
            ReportedRun(config, train, val, root, run_info.code_commit, schedule.epoch),
        ) as explainer,
        FirstMinute(worker, state.step),
    ):
        # Only rank 0 looks for requests; the others have none of their own.
        poll = hooks.request if ranks.first else NO_HOOKS.request
        guard = Guard(run_info.folder, config.guard, ranks, tracker, saver)
        meter = Meter(
            schedule, ranks, tracker, lambda: saver.stalled_s, Forecast(config, schedule, val.images, ranks.world_size)
        )
        parts = LoopParts(batches, bad, guard, saver, meter, poll, hooks.stepped)
        while True:
            if state.step and evaluation_due(worker, state.step):
                with meter.paused_for_evaluation():
                    validate(worker, state, saver, hooks.keep_unsent, explainer.start, meter.loss)
            if state.step >= schedule.total_steps:
                return
            request = _train(worker, state, parts, until=next_boundary(config, schedule, state.step))
            _save(worker, state, parts)
            if request.stop:
                return


def _newest(root: Location, run_info: RunInfo, ranks: Ranks) -> tuple[Location | None, Meta | None]:
    """Return the newest checkpoint and its metadata, or None; a collective call.

    Rank 0 decides: another rank could look a moment later, or at a folder that is not yet in sync.
    """

    def look() -> tuple[Location, Meta] | None:
        return catalog.newest_with_meta(root, run_info.folder, catalog.STALE_S, run_info.run_id)

    return patiently(ranks, lambda: on_first(ranks, look)) or (None, None)


def _train(worker: WorkerContext, state: TrainState, parts: LoopParts, until: int) -> Request:
    """Train until step `until` or until a rank asks to stop; return the last requests.

    A request to save does not end it, so the points of the curves stay where they are.
    """
    schedule, meter = worker.schedule, parts.meter
    lap = meter.clock.lap
    request = NO_REQUEST
    while state.step < until and not request.stop:
        request = NO_REQUEST
        lap("other")
        micro_batches = next(parts.batches)
        lap("data_wait")
        set_learning_rates(state.optimizer, schedule.factor(state.step))
        try:
            with explaining(state.model, state.optimizer, micro_batches, worker.config, worker.ranks, state.step):
                result = train_step(
                    state.model,
                    micro_batches,
                    state.optimizer,
                    worker.config,
                    worker.ranks,
                    state.step,
                    parts.request(),
                    lap,
                    state.graphs,
                )
            images = schedule.samples(state.step + 1) - schedule.samples(state.step)
            meter.add(result.losses, result.grad_norm, images)
            if state.ema:
                state.ema.update(state.step)
            request = result.request
        except Diverged as event:
            with meter.paused():
                parts.guard.handle(event, state.model, state.optimizer, state.averages)
            request = event.request
        state.step += 1
        parts.stepped(state.step)
        if state.step % worker.config.track.log_every == 0 or state.step == until or request.stop:
            meter.log(state.step, learning_rates(state.model, state.optimizer))
            if state.graphs and worker.tracker:
                worker.tracker.metrics({HIT_RATE: state.graphs.read_hit_rate()}, state.step)
        if request.save and state.step < until and not request.stop:
            _save(worker, state, parts)
    return request


def _save(worker: WorkerContext, state: TrainState, parts: LoopParts) -> None:
    with parts.meter.paused():
        parts.saver.save(state.model, state.optimizer, checkpoint_metadata(worker, state.step), state.averages)
        if worker.config.data.max_bad_samples:
            report_left_out(worker.tracker, parts.bad, worker.ranks)
