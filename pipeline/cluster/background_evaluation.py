"""Evaluation of checkpoints in the background, while training continues (`evaluate.asynchronous`).

The `meta.json` of a checkpoint says if it is to be evaluated; it is not pruned before it has its metrics, unless too
many wait (`pruning.MOST_WAITING`). The driver looks for such checkpoints and evaluates them, the oldest first and one at
a time, as Ray tasks with resources of their own. Nothing but the checkpoints records what is due, so after any kill the
next `detr resume` evaluates the rest. A task writes the spool of its node, since only one process may write a spool,
with the step of the checkpoint.

Ray Train's `ValidationConfig` is not used: it evaluates what workers report to Ray, which is lost when the driver dies.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.checkpoint import catalog
from pipeline.checkpoint.catalog import Shelf
from pipeline.checkpoint.location import Location, checkpoint_root
from pipeline.checkpoint.pruning import MOST_WAITING, prune
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.worker import WorkerJob
from pipeline.config import RunConfig
from pipeline.errors import Postponed, TrainingError
from pipeline.tracking.run_spools import EVALUATION, open_tracker
from shards.errors import one_line
from shards.store import storage
from shards.store.retry import may_pass
from shards.store.sizes import size_text

Say = Callable[[str], None]
_TASK = "evaluation"  # a note: the newest task
_HEARS_S = 1.0
_TRIES = 4  # attempts after training while the cause may pass
_MANY = 3  # checkpoints without metrics


class Evaluator:
    """Evaluation of a run's checkpoints while the workers train.

    `folder` is the run's location. `evaluate` evaluates one checkpoint and returns when its metrics are stored, or
    raises, `Postponed` or a store's error if a later attempt may succeed. `stop_requested` returns True if the run is
    asked to stop. `look_s` is the interval in seconds between looks for checkpoints to evaluate, `again_s` that between
    attempts after training.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Location,
        evaluate: Callable[[Location], None],
        say: Say,
        stop_requested: Callable[[], bool] = lambda: False,
        look_s: float = 2.0,
        again_s: float = 30.0,
    ) -> None:
        self._shelf, self._keep = Shelf(checkpoint_root(config.checkpoint.store, folder)), config.checkpoint.keep
        self._evaluate, self._say, self._stop_requested, self._look_s = evaluate, say, stop_requested, look_s
        self._again_s = again_s
        self._trained, self._stopped = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._warned = False

    def around(self, fit: Callable[[], Any]) -> Callable[[], None]:
        """Return a function that calls `fit` and returns when all its checkpoints are evaluated as well.

        It does not wait if `fit` fails or the run is asked to stop; `detr resume` then evaluates the rest.
        """

        def run() -> None:
            thread = threading.Thread(target=self._work, name="evaluator", daemon=True)
            thread.start()
            try:
                fit()
            except BaseException:
                self._stopped.set()
                raise
            self._trained.set()
            while thread.is_alive() and not self._stop_requested():
                thread.join(0.2)
            if thread.is_alive():
                self._stopped.set()
            elif self._error is None:
                # Not earlier: any checkpoint without metrics might have been the best.
                prune(self._shelf, self._keep, look=True)

        return run

    def raise_failure(self) -> None:
        """Raise `TrainingError` if a checkpoint could not be evaluated, `Postponed` if a later attempt may succeed."""
        if self._error:
            passes = isinstance(self._error, Postponed) or may_pass(self._error)
            raise (Postponed if passes else TrainingError)(
                f"{one_line(self._error)}; training is done and nothing is lost: `detr resume` evaluates what is left"
            ) from self._error

    def _work(self) -> None:
        failed: set[Location] = set()
        tries = 0
        while not self._stopped.is_set():
            trained = self._trained.is_set()  # read before listing, so that the last checkpoint is not missed
            path = None
            try:
                pending = self._shelf.look().pending()
                path = next((candidate for candidate in pending if trained or candidate not in failed), None)
                if path is None and trained:
                    return
                if len(pending) >= _MANY and not trained:
                    self._warn_of(pending)
                if path is None:
                    self._stopped.wait(self._look_s)
                else:
                    self._evaluate(path)
                    tries = 0
            except SystemExit:
                return  # Ray raises it when it is shut down during a task
            except Exception as error:
                passes = isinstance(error, Postponed) or may_pass(error)
                if trained and passes and tries < _TRIES:
                    tries += 1
                    self._say(f"warning: {one_line(error)}; tried again in {self._again_s:.0f} s")
                    self._stopped.wait(self._again_s)
                    continue
                if trained:
                    self._error = error
                    return
                self._say(f"warning: {one_line(error)}; it is tried again when training has ended")
                if path:
                    failed.add(path)
                self._stopped.wait(self._look_s)

    def _warn_of(self, pending: list[Location]) -> None:
        if self._warned:
            return
        size = max(sum(storage.listing(str(path)).values()) for path in pending)
        self._say(
            f"warning: evaluation is slower than training: {len(pending)} checkpoints are not evaluated yet and are kept, "
            f"each {size_text(size)} in {self._shelf.root}; from {MOST_WAITING} on, older ones are deleted unevaluated"
        )
        self._warned = True


def evaluator_on_ray(job: WorkerJob, gpu: bool, say: Say) -> Evaluator:
    """Return an evaluator whose evaluations are tasks of the connected Ray cluster."""
    import ray

    _warn_of_resources(ray.cluster_resources(), job.config, gpu, say)
    # Ray tries again after a killed process or a lost node, but not after an error of the evaluation itself.
    task = ray.remote(_evaluate_in_ray).options(
        num_cpus=job.config.cluster.cpus_per_worker,
        num_gpus=int(gpu),
        max_retries=3,
        retry_exceptions=False,
        name="evaluation",
    )

    def evaluate(path: Location) -> None:
        try:
            ray.get(task.remote(job, path, gpu))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            message = f"checkpoint {path} could not be evaluated ({one_line(cause)})"
            raise (Postponed if _passes(error) else TrainingError)(message) from error

    return Evaluator(job.config, job.folder, evaluate, say, job.notes.stop_requested)


def _passes(error: Exception) -> bool:
    """Return True for an evaluation whose node was lost, or whose store did not answer."""
    from ray.exceptions import OutOfMemoryError, RayTaskError

    if isinstance(error, RayTaskError):
        return may_pass(error.cause) or isinstance(error.cause, ConnectionError | TimeoutError)
    return not isinstance(error, OutOfMemoryError)


def _end_process() -> None:
    os._exit(1)


@contextmanager
def sole_evaluation(notes: Notes, end: Callable[[], None] = _end_process) -> Iterator[None]:
    """Be the only task that evaluates inside the block: an older one calls `end`, by default to end its process.

    Ray may start a task again that it believes lost but that still runs.
    """
    number = secrets.token_hex(8).encode()
    older = notes.read(_TASK)
    notes.write(_TASK, number, overwrite=True)
    if older is not None:
        time.sleep(3 * _HEARS_S)  # it was killed, or it hears of this task and ends
    closed = threading.Event()

    def watch() -> None:
        while not closed.wait(_HEARS_S):
            if notes.read(_TASK) not in (number, None):
                end()

    threading.Thread(target=watch, name="evaluations", daemon=True).start()
    try:
        yield
    finally:
        closed.set()
        notes.delete(_TASK)


def _warn_of_resources(have: dict[str, float], config: RunConfig, gpu: bool, say: Say) -> None:
    processes = config.cluster.workers + 1
    need = {"CPU": processes * config.cluster.cpus_per_worker}
    if gpu:
        need["GPU"] = processes
    for kind, count in need.items():
        if have.get(kind, 0) < count:
            say(
                f"warning: the cluster has {have.get(kind, 0):g} {kind}s, and {config.cluster.workers} workers with an "
                f"evaluation beside them need {count}: evaluations wait for the end of training, and up to {MOST_WAITING} "
                "checkpoints are kept for them"
            )


def _evaluate_in_ray(job: WorkerJob, path: Location, gpu: bool) -> None:
    """Evaluate a checkpoint of the run in this process alone; runs as a Ray task."""
    import torch

    from pipeline.tracking.tracker import forward_warnings
    from pipeline.training.validation import evaluate_checkpoint

    config = job.config
    torch.set_num_threads(config.cluster.cpus_per_worker)
    with sole_evaluation(job.notes):
        tracker = open_tracker(EVALUATION, job.folder, job.run_id, job.mlflow)
        try:
            with forward_warnings(tracker):
                if catalog.read_evaluation(path) is None:
                    device = torch.device("cuda" if gpu else "cpu")
                    evaluate_checkpoint(config, path, device, tracker, tracker.keep_unsent)
        finally:
            tracker.close()
