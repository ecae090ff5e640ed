"""Evaluation of a run: of the current weights during training, or of a checkpoint in the background."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from msgspec.structs import replace
from torch import nn

from detr.compute import arithmetic, uncompiled
from detr.variant import DETR
from pipeline.checkpoint import catalog, history
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.history import Evaluated
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.metadata import read_meta
from pipeline.checkpoint.patience import patiently
from pipeline.checkpoint.saver import Saver
from pipeline.config import RunConfig
from pipeline.data.datasets import open_data
from pipeline.display.pictures import evaluation_sheet
from pipeline.distributed.parallel import gathered_model
from pipeline.distributed.ranks import Ranks, on_first
from pipeline.evaluation.evaluate_model import EvaluateOptions, Evaluation, evaluate_model
from pipeline.evaluation.kept import keep_beside
from pipeline.figures import deciding_text
from pipeline.schedule import is_evaluated
from pipeline.tracking.tags import TAG_PHASE
from pipeline.tracking.tracker import Tracker
from pipeline.training.explaining import explain
from pipeline.training.model import build_on_device, host_copy
from pipeline.training.reporting import report_evaluation, report_pictures
from pipeline.training.run_report import ReportedRun
from pipeline.training.state import TrainState, WorkerContext
from shards.dataset.manifest import Manifest
from shards.workers import Progress


def evaluation_due(worker: WorkerContext, step: int) -> bool:
    """Return True if the checkpoint of `step` must be evaluated now; a collective call.

    That is at the end of every `evaluate.every` epochs and of the run, unless its metrics are already written. Always
    false if evaluations run in the background (`evaluate.asynchronous`).
    """
    config = worker.config
    if config.evaluate.asynchronous or not is_evaluated(config, worker.schedule, step):
        return False
    path = catalog.folder_of(worker.root, step)
    return patiently(worker.ranks, lambda: on_first(worker.ranks, lambda: catalog.read_evaluation(path) is None))


def validate(
    worker: WorkerContext,
    state: TrainState,
    saver: Saver,
    keep_unsent: Callable[[], None] = lambda: None,
    start_explanation: Callable[[Evaluation, int, DETR | None], None] = lambda *_: None,
    loss: float | None = None,
) -> None:
    """Score the state on the validation data, report the metrics and write them beside its checkpoint.

    A collective call. See `LoopHooks.keep_unsent`. `start_explanation` gets the evaluation, its step and a copy of the model
    on rank 0. `loss` is the mean training loss before.
    """
    config, ranks, tracker = worker.config, worker.ranks, worker.tracker
    start = time.perf_counter()

    def build_model() -> nn.Module:
        return build_on_device(config, worker.train.num_classes, ranks.device)

    with uncompiled():  # evaluation batches have many canvas shapes, and each would be compiled
        model = gathered_model(state.model, build_model, state.averages)
        evaluation = _score(config, model, worker.train, worker.val, ranks, _phase_reporter(tracker))
        scored = host_copy(model) if tracker and config.evaluate.explain else None
    saver.finish()  # the metrics are written beside the checkpoint
    path, epoch = catalog.folder_of(worker.root, state.step), worker.schedule.epoch(state.step)
    _report(config, path, worker.val, evaluation, tracker, state.step, epoch, start)
    _record(path, Evaluated(state.step, epoch, {}, loss), evaluation, ranks, keep_unsent)
    if ranks.first:
        saver.prune()
    if evaluation is not None:
        start_explanation(evaluation, state.step, scored)
    if tracker:
        tracker.metrics({"pause/evaluation_s": time.perf_counter() - start}, state.step)
        tracker.tags({TAG_PHASE: "training"})


def evaluate_checkpoint(
    config: RunConfig,
    path: Location,
    device: torch.device,
    tracker: Tracker | None,
    keep_unsent: Callable[[], None] = lambda: None,
) -> None:
    """Score a checkpoint in this process alone; the metrics equal those of `validate`, because batches are the same."""
    start = time.perf_counter()
    train, val = open_data(config.data)
    meta = read_meta(path)
    model = build_on_device(config, meta.num_classes, device)
    checkpoint_state.load_weights(path, model, averaged=meta.ema)
    last = meta.step >= meta.total_steps  # before the last step, the phase of the run is that of its training
    ranks = Ranks(device=device)
    with arithmetic(config.compute.tf32, deterministic=config.compute.deterministic):
        evaluation = _score(config, model, train, val, ranks, _phase_reporter(tracker if last else None))
        _report(config, path, val, evaluation, tracker, meta.step, meta.epoch, start)
        if tracker and evaluation is not None:
            run = ReportedRun(config, train, val, path.parent.parent, meta.code_commit, lambda _: meta.epoch)
            explain(tracker, val, evaluation, meta.step, config.evaluate.explain, run, model)
    _record(path, Evaluated(meta.step, meta.epoch, {}), evaluation, ranks, keep_unsent)


def _phase_reporter(tracker: Tracker | None) -> Progress:
    def progress(done: int, total: int) -> None:
        if tracker:
            tracker.tags({TAG_PHASE: f"evaluating {done * 100 // max(total, 1)}%"})

    if tracker:
        tracker.tags({TAG_PHASE: "evaluating"})
    return progress


def _score(
    config: RunConfig, model: nn.Module, train: Manifest, val: Manifest, ranks: Ranks, progress: Progress
) -> Evaluation | None:
    options = EvaluateOptions(
        config.transform,
        config.evaluate.batch_size,
        config.evaluate.batching,
        config.data.reader_threads,
        config.evaluate.limit,
        config.evaluate.scorer,
        config.evaluate.pictures,
    )
    return evaluate_model(model, val, train.categories, options, ranks=ranks, progress=progress)


def _report(
    config: RunConfig,
    path: Location,
    val: Manifest,
    evaluation: Evaluation | None,
    tracker: Tracker | None,
    step: int,
    epoch: float,
    start: float,
) -> None:
    """Report and keep an evaluation on rank 0, the only one that has it."""
    if tracker and evaluation:
        report_evaluation(tracker, path, val, step, epoch, evaluation, start)
        title = f"{config.run_name}, epoch {epoch:g}, step {step:,}: {deciding_text(evaluation.score.metrics)}"
        report_pictures(tracker, partial(evaluation_sheet, val, evaluation), config.evaluate.pictures, step, title)
    if evaluation:
        keep_beside(path, val, evaluation)


def _record(
    path: Location, entry: Evaluated, evaluation: Evaluation | None, ranks: Ranks, keep_unsent: Callable[[], None]
) -> None:
    """Write the metrics beside their checkpoint and into the run's history, after the reports; a collective call.

    After a kill in between, the evaluation is repeated and its reports are dropped as duplicates. Once the metrics are
    written nothing repeats the reports, so they must be kept by then.
    """

    def write() -> None:
        assert evaluation is not None  # rank 0 has it
        keep_unsent()
        history.add(path.parent.parent, replace(entry, metrics=evaluation.score.metrics))
        catalog.write_evaluation(path, evaluation.score.metrics)

    patiently(ranks, lambda: on_first(ranks, write))
