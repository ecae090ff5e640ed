"""Evaluation inside a run: when it is due, and what is done with its figures."""

from __future__ import annotations

import time

from detr.execution import uncompiled
from pipeline import checkpoint
from pipeline.boundaries import next_evaluation
from pipeline.evaluate import evaluate
from pipeline.parallel import whole
from pipeline.restoring import build
from pipeline.saving import Saver
from pipeline.state import State, Worker
from pipeline.telling import tell_evaluation, tell_pictures
from pipeline.track import TAG_PHASE


def evaluation_due(worker: Worker, step: int) -> bool:
    """True at the end of every `evaluate.every` epochs and of the run, unless this checkpoint has its figures."""
    if next_evaluation(worker.config, worker.schedule, step - 1) != step:
        return False
    path = checkpoint.folder_of(worker.home, step)
    return worker.ranks.gather(worker.ranks.first and checkpoint.read_evaluation(path) is None)[0] is True


def validate(worker: Worker, state: State, saver: Saver) -> None:
    """Score the state on the whole validation set, tell the figures and note them beside its checkpoint; a collective call."""
    config, tracker = worker.config, worker.tracker
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if tracker:
            tracker.tags({TAG_PHASE: f"evaluating {done * 100 // max(total, 1)}%"})

    if tracker:
        tracker.tags({TAG_PHASE: "evaluating"})
    with uncompiled():  # its canvases have any shape, each of which would be compiled
        evaluation = evaluate(
            whole(state.model, lambda: build(worker), state.averages),
            worker.val,
            worker.train.categories,
            transform=config.transform,
            batch_size=config.evaluate.batch_size,
            batching=config.evaluate.batching,
            ranks=worker.ranks,
            threads=config.data.reader_threads,
            limit=config.evaluate.limit,
            progress=progress,
        )
    saver.finish()  # its figures are noted beside it
    if evaluation is not None:
        path = checkpoint.folder_of(worker.home, state.step)
        if tracker:
            tell_evaluation(tracker, path, state.step, worker.schedule.epoch(state.step), evaluation, start)
            tell_pictures(tracker, worker.val, evaluation.detections, config.evaluate.pictures, state.step)
            tracker.tags({TAG_PHASE: "training"})
        # Told first, noted last: a kill between the two repeats what is then dropped as told before.
        checkpoint.write_evaluation(path, evaluation.score.metrics)
        checkpoint.prune(worker.home, config.checkpoint.keep)
    worker.ranks.barrier()
