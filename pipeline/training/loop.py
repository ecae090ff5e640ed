"""Training loop of one worker: from the newest checkpoint, or the initial weights, to the last step.

It uses neither Ray nor MLflow: ranks, folder and tracker are passed in, so the same loop runs in a unit test, in one
process, and on a cluster. The position of a run is one number, the step; the plan, the schedule and the augmentation are
functions of it. New, interrupted and finished runs take the same path through the loop:

    evaluate if due -> stop if done -> train to the next boundary -> save -> (again)

A kill between saving and evaluating therefore costs nothing: the evaluation is still due when the run continues.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from detr.batch import Batch
from pipeline import checkpoint, saved
from pipeline.boundaries import next_boundary
from pipeline.checkpoint_store import home_of
from pipeline.config import RunConfig
from pipeline.data import check_cache, open_data
from pipeline.forecast import Forecast
from pipeline.guard import Guard
from pipeline.identity import continuation
from pipeline.memory import explaining
from pipeline.meta import meta_of
from pipeline.meter import Meter
from pipeline.optim import Schedule, set_learning_rates
from pipeline.parallel import Ranks
from pipeline.restoring import restore
from pipeline.samples import training_batches
from pipeline.saving import Saver, open_saver
from pipeline.state import Place, State, Worker
from pipeline.step import Diverged, train_step
from pipeline.stopping import NOBODY, NOTHING, Asked, Overseer, StopWatch
from pipeline.telling import tell_left_out, tell_opening
from pipeline.track import Tracker
from pipeline.validation import evaluation_due, validate


@dataclass(frozen=True)
class Means:
    """Collaborators of the loop in each step."""

    batches: Iterator[tuple[Batch, ...]]
    guard: Guard
    """Handles steps that diverge."""
    saver: Saver
    meter: Meter
    watch: Callable[[], Asked]
    """Returns the requests of the driver and the cluster to this rank."""
    stepped: Callable[[int], None]
    """Called after each step with its number."""

    def asks(self) -> Asked:
        """Return the watch's requests, with a save if the saver needs one."""
        request = self.watch()
        return request._replace(save=request.save or self.saver.due())


def run(config: RunConfig, place: Place, ranks: Ranks, tracker: Tracker | None, overseer: Overseer = NOBODY) -> None:
    """Train until the last step or a request to stop, from the newest checkpoint; a collective call."""
    train, val = open_data(config.data)
    check_cache(config.data, train, val)
    # Rank 0 decides: another rank could look a moment later, or at a folder that is not yet in sync.
    home = home_of(config.checkpoint.store, place.folder)
    newest = ranks.broadcast(saved.newest_of_run(home, place.folder) if ranks.first else None)
    meta = None if newest is None else checkpoint.read_meta(newest)
    origin = continuation(meta, config, train, place.accept_change).origin
    schedule = Schedule(config.optim, train.images, config.data.epoch_tail, origin)
    worker = Worker(config, place, ranks, tracker, train, val, schedule)
    state = restore(worker, newest, 0 if meta is None else meta.step)
    if state.step == 0 and tracker:
        tell_opening(config, tracker, val)
    # One stream to the end of the run: checkpoints, evaluations and ends of epochs do not stop its threads.
    with (
        closing(training_batches(train, config, schedule, ranks, state.step, schedule.total_steps)) as batches,
        open_saver(
            home,
            state.optimizer,
            ranks,
            config.checkpoint.keep,
            config.checkpoint.every_minutes,
            partial(saved.note_saved, place.folder),
        ) as saver,
    ):
        # Only rank 0 looks for requests; the others have none of their own.
        watch = StopWatch(place.folder, overseer).asked if ranks.first else _no_request
        guard = Guard(place.folder, config.guard, ranks, tracker, saver)
        meter = Meter(
            schedule, ranks, tracker, lambda: saver.stalled_s, Forecast(config, schedule, val.images, ranks.world_size)
        )
        means = Means(batches, guard, saver, meter, watch, overseer.stepped)
        while True:
            if state.step and evaluation_due(worker, state.step):
                with meter.evaluating():
                    validate(worker, state, saver)
            if state.step >= schedule.total_steps:
                return
            asked = _train(worker, state, means, until=next_boundary(config, schedule, state.step))
            _save(worker, state, means)
            if asked.stop:
                return


def _no_request() -> Asked:
    return NOTHING


def _train(worker: Worker, state: State, means: Means, until: int) -> Asked:
    """Train until step `until` or until a rank asks to stop; return the last requests.

    A request to save does not end it, so the points of the curves stay where they are.
    """
    schedule, meter = worker.schedule, means.meter
    lap = meter.clock.lap
    asked = NOTHING
    while state.step < until and not asked.stop:
        asked = NOTHING
        lap("other")
        micro_batches = next(means.batches)
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
                    means.asks(),
                    lap,
                )
            images = schedule.samples(state.step + 1) - schedule.samples(state.step)
            meter.add(result.losses, result.grad_norm, images)
            if state.ema:
                state.ema.update(state.step)
            asked = result.asked
        except Diverged as event:
            with meter.aside():
                means.guard.handle(event, state.model, state.optimizer, state.averages)
            asked = event.asked
        state.step += 1
        means.stepped(state.step)
        if state.step % worker.config.track.log_every == 0 or state.step == until or asked.stop:
            meter.tell(state.step, state.optimizer)
        if asked.save and state.step < until and not asked.stop:
            _save(worker, state, means)
    return asked


def _save(worker: Worker, state: State, means: Means) -> None:
    with means.meter.aside():
        means.saver.save(state.model, state.optimizer, meta_of(worker, state.step), state.averages)
        if worker.config.data.max_bad_samples:
            tell_left_out(worker.tracker, worker.train, worker.ranks)
