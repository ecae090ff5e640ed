"""Evaluations that training does not wait for (`evaluate.asynchronous`).

A checkpoint that is due says so in its `meta.json` and is not pruned before it has its figures. The driver looks for
such checkpoints and has them evaluated, the oldest first and one at a time, as a Ray task with resources of its own.
What is due is read from the checkpoints alone: whatever is killed, the next `detr resume` evaluates what is left. The
task writes a spool of its own (`pipeline/spool.py`: one process writes a spool), with the step of the checkpoint.

Not Ray Train's `ValidationConfig`: it evaluates what workers report to Ray, which forgets it when the driver dies.
"""

from __future__ import annotations

import fcntl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import checkpoint
from pipeline.checkpoint_store import Location, home_of
from pipeline.config import RunConfig, from_json
from pipeline.errors import TrainingError, first_line
from pipeline.mlflow_events import EventSender
from pipeline.spool import SpoolTracker
from pipeline.stopping import asked_to_stop

Say = Callable[[str], None]
SPOOL = "spool-evaluation"
"""Folder of the spool beside the run's own."""
_LOOK_S = 2.0
_MANY = 3


class Evaluator:
    """Has the checkpoints of a run evaluated while the workers train.

    folder: the run's. evaluate: evaluates one checkpoint and returns when its figures are noted, or raises.
    """

    def __init__(self, config: RunConfig, folder: Path, evaluate: Callable[[Location], None], say: Say) -> None:
        self._home, self._keep = home_of(config.checkpoint.store, folder), config.checkpoint.keep
        self._folder, self._evaluate, self._say = folder, evaluate, say
        self._trained, self._given_up = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._warned = False

    def around(self, fit: Callable[[], Any]) -> Callable[[], None]:
        """A function that calls `fit` and returns when all that it saved is evaluated as well.

        Where `fit` fails or the run is asked to stop it does not wait; `detr resume` evaluates what is left.
        """

        def run() -> None:
            thread = threading.Thread(target=self._work, name="evaluator", daemon=True)
            thread.start()
            try:
                fit()
            except BaseException:
                self._given_up.set()
                raise
            self._trained.set()
            while thread.is_alive() and not asked_to_stop(self._folder):
                thread.join(0.2)
            if thread.is_alive():
                self._given_up.set()
            elif self._error is None:
                checkpoint.prune(self._home, self._keep)  # until now none was pruned that might be the best

        return run

    def raise_failure(self) -> None:
        """Raise `TrainingError` where a checkpoint could not be evaluated."""
        if self._error:
            raise TrainingError(
                f"{first_line(self._error)}; training is done and nothing is lost: `detr resume` evaluates what is left"
            ) from self._error

    def _work(self) -> None:
        failed: set[Location] = set()
        while not self._given_up.is_set():
            trained = self._trained.is_set()  # before looking, so that the last checkpoint is not missed
            path = None
            try:
                waiting = checkpoint.waiting(self._home)
                path = next((one for one in waiting if trained or one not in failed), None)
                if path is None and trained:
                    return
                if len(waiting) >= _MANY and not trained:
                    self._warn_of(len(waiting))
                if path is None:
                    self._given_up.wait(_LOOK_S)
                else:
                    self._evaluate(path)
            except SystemExit:
                return  # Ray's, where it is shut down while a task runs
            except Exception as error:
                if trained:
                    self._error = error
                    return
                self._say(f"warning: {first_line(error)}; it is tried again when training has ended")
                failed |= {path} if path else set()
                self._given_up.wait(_LOOK_S)

    def _warn_of(self, waiting: int) -> None:
        if not self._warned:
            self._say(
                f"warning: evaluation is slower than training: {waiting} checkpoints wait for theirs and are kept"
            )
        self._warned = True


def evaluator_on_ray(config: RunConfig, job: dict[str, Any], gpu: bool, say: Say) -> Evaluator:
    """An evaluator whose evaluations are tasks of the connected Ray cluster. job: as that of the workers."""
    import ray

    cpus = config.cluster.cpus_per_worker
    _warn_of_room(ray.cluster_resources(), config, gpu, say)
    # A killed process or a lost node is Ray's to try again; what the evaluation itself raises is not.
    task = ray.remote(_evaluate_in_ray).options(
        num_cpus=cpus, num_gpus=int(gpu), max_retries=3, retry_exceptions=False, name="evaluation"
    )

    def evaluate(path: Location) -> None:
        try:
            ray.get(task.remote(job, path.name, gpu))
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            raise TrainingError(f"checkpoint {path} could not be evaluated ({first_line(cause)})") from error

    return Evaluator(config, Path(job["folder"]), evaluate, say)


def _warn_of_room(have: dict[str, float], config: RunConfig, gpu: bool, say: Say) -> None:
    need = {"CPU": (config.cluster.workers + 1) * config.cluster.cpus_per_worker}
    need |= {"GPU": config.cluster.workers + 1} if gpu else {}
    for kind, count in need.items():
        if have.get(kind, 0) < count:
            say(
                f"warning: the cluster has {have.get(kind, 0):g} {kind}s, and {config.cluster.workers} workers with an "
                f"evaluation beside them need {count}: evaluations wait for the end of training"
            )


def _evaluate_in_ray(job: dict[str, Any], name: str, gpu: bool) -> None:
    """What Ray runs as a task: the checkpoint `name` of the run, evaluated in this process alone."""
    import torch

    from pipeline.telling import telling_warnings
    from pipeline.validation import evaluate_checkpoint

    config, folder = from_json(job["config"]), Path(job["folder"])
    torch.set_num_threads(config.cluster.cpus_per_worker)
    spool = folder / SPOOL
    spool.mkdir(exist_ok=True)
    with (spool / "lock").open("w") as lock:
        # Ray may think a task lost that still runs somewhere, and start it again.
        fcntl.flock(lock, fcntl.LOCK_EX)
        tracker = SpoolTracker(spool, EventSender(job["tracking_uri"], job["run_id"], spool), any_order=True)
        try:
            with telling_warnings(tracker):
                path = home_of(config.checkpoint.store, folder) / "checkpoints" / name
                if checkpoint.read_evaluation(path) is None:
                    evaluate_checkpoint(config, path, torch.device("cuda" if gpu else "cpu"), tracker)
        finally:
            tracker.close()
