"""Evaluation of checkpoints in the background, while training continues (`evaluate.asynchronous`).

The `meta.json` of a checkpoint says if it is to be evaluated; it is not pruned before it has its metrics. The driver
looks for such checkpoints and evaluates them, the oldest first and one at a time, as Ray tasks with resources of their
own. Nothing but the checkpoints records what is due, so after any kill the next `detr resume` evaluates the rest. A
task writes the spool of its node, since only one process may write a spool, with the step of the checkpoint.

Ray Train's `ValidationConfig` is not used: it evaluates what workers report to Ray, which is lost when the driver dies.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from typing import Any

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location, checkpoint_root
from pipeline.cluster.worker import WorkerJob
from pipeline.config import RunConfig
from pipeline.errors import TrainingError
from pipeline.run_folder import scratch
from pipeline.tracking.run_spools import EVALUATION, open_tracker
from shards.errors import one_line

Say = Callable[[str], None]
_MANY = 3  # checkpoints without metrics


class Evaluator:
    """Evaluation of a run's checkpoints while the workers train.

    `folder` is the run's location. `evaluate` evaluates one checkpoint and returns when its metrics are stored, or
    raises. `stop_requested` returns True if the run is asked to stop. `look_s` is the interval in seconds between
    looks for checkpoints to evaluate.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: Location,
        evaluate: Callable[[Location], None],
        say: Say,
        stop_requested: Callable[[], bool] = lambda: False,
        look_s: float = 2.0,
    ) -> None:
        self._root, self._keep = checkpoint_root(config.checkpoint.store, folder), config.checkpoint.keep
        self._evaluate, self._say, self._stop_requested, self._look_s = evaluate, say, stop_requested, look_s
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
                catalog.prune(self._root, self._keep)  # before, any checkpoint without metrics might have been the best

        return run

    def raise_failure(self) -> None:
        """Raise `TrainingError` if a checkpoint could not be evaluated."""
        if self._error:
            raise TrainingError(
                f"{one_line(self._error)}; training is done and nothing is lost: `detr resume` evaluates what is left"
            ) from self._error

    def _work(self) -> None:
        failed: set[Location] = set()
        while not self._stopped.is_set():
            trained = self._trained.is_set()  # read before listing, so that the last checkpoint is not missed
            path = None
            try:
                pending = catalog.pending_evaluation(self._root)
                path = next((candidate for candidate in pending if trained or candidate not in failed), None)
                if path is None and trained:
                    return
                if len(pending) >= _MANY and not trained:
                    self._warn_of(len(pending))
                if path is None:
                    self._stopped.wait(self._look_s)
                else:
                    self._evaluate(path)
            except SystemExit:
                return  # Ray raises it when it is shut down during a task
            except Exception as error:
                if trained:
                    self._error = error
                    return
                self._say(f"warning: {one_line(error)}; it is tried again when training has ended")
                if path:
                    failed.add(path)
                self._stopped.wait(self._look_s)

    def _warn_of(self, pending: int) -> None:
        if not self._warned:
            self._say(
                f"warning: evaluation is slower than training: {pending} checkpoints are not evaluated yet and are kept"
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
            raise TrainingError(f"checkpoint {path} could not be evaluated ({one_line(cause)})") from error

    return Evaluator(job.config, job.folder, evaluate, say, job.notes.stop_requested)


def _warn_of_resources(have: dict[str, float], config: RunConfig, gpu: bool, say: Say) -> None:
    processes = config.cluster.workers + 1
    need = {"CPU": processes * config.cluster.cpus_per_worker}
    if gpu:
        need["GPU"] = processes
    for kind, count in need.items():
        if have.get(kind, 0) < count:
            say(
                f"warning: the cluster has {have.get(kind, 0):g} {kind}s, and {config.cluster.workers} workers with an "
                f"evaluation beside them need {count}: evaluations wait for the end of training"
            )


def _evaluate_in_ray(job: WorkerJob, path: Location, gpu: bool) -> None:
    """Evaluate a checkpoint of the run in this process alone; runs as a Ray task."""
    import torch

    from pipeline.tracking.tracker import forward_warnings
    from pipeline.training.validation import evaluate_checkpoint

    config = job.config
    torch.set_num_threads(config.cluster.cpus_per_worker)
    with (scratch(job.run_id) / "evaluation.lock").open("w") as lock:
        # Ray may start a task again that it believes lost but that still runs.
        fcntl.flock(lock, fcntl.LOCK_EX)
        tracker = open_tracker(EVALUATION, job.folder, job.run_id, job.tracking_uri)
        try:
            with forward_warnings(tracker):
                if catalog.read_evaluation(path) is None:
                    device = torch.device("cuda" if gpu else "cpu")
                    evaluate_checkpoint(config, path, device, tracker, tracker.keep_unsent)
        finally:
            tracker.close()
