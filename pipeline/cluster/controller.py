"""Callback of Ray's controller: record why a group of workers ended, and let it save before a resize.

The controller is an actor of Ray on the driver's machine, which calls these methods between two polls of the workers.
They leave notes, which the next group and the driver read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from pipeline.cluster.deaths import find_dead, reason_of_death
from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.claims import record_claim
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.ray_internals import ControllerCallback, WorkerGroupCallback

_LOOK_S = 0.2


class GroupEndCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Callback that records why groups of workers end, and lets a group save before it is replaced."""

    def __init__(self, notes: Notes, handover_s: float = 120.0) -> None:
        # By default time for a step or an evaluation, and for the checkpoint.
        self._notes, self._handover_s = notes, handover_s
        self._actors: dict[int, Any] = {}

    def after_controller_start(self, train_run_context: Any) -> None:
        """Record the claim of this controller on the cluster's resources, called by Ray when it starts."""
        import ray

        # The name is that of `ScalingPolicy.after_controller_start`.
        record_claim(self._notes.store, f"train-{train_run_context.run_id}", ray.get_runtime_context().get_job_id())

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Keep the actors of the group, called by Ray when they run."""
        self._actors = {worker.distributed_context.world_rank: worker.actor for worker in worker_group.get_workers()}

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Handle a change of state, called by Ray; the states are distinguished by class name."""
        state = type(current_state).__name__
        if state == "ResizingState":
            self._let_save(current_state.scaling_decision.num_workers)
        ends_with = getattr(current_state, "next_state", None) if state == "ShuttingDownState" else current_state
        error = getattr(ends_with, "training_failed_error", None)
        if error is not None and state in ("RestartingState", "ShuttingDownState"):
            record_group_end(self._notes, error, self._actors)

    def _let_save(self, workers: int) -> None:
        """Ask the workers, which run well, to save and return because `workers` of them will replace them."""
        if not attempts.has_started(self._notes):
            return
        attempts.record_end(self._notes, f"the cluster has resources for {workers} workers now", wanted=True)
        attempts.request_handover(self._notes)
        until = time.monotonic() + self._handover_s
        while not attempts.handover_finished(self._notes) and time.monotonic() < until:
            time.sleep(_LOOK_S)


def record_group_end(notes: Notes, error: BaseException, actors: Mapping[int, Any]) -> None:
    """Record why the group of workers, `actors` by rank, ended, as far as Ray knows or finds out by asking them."""
    why, certain = explain(error)
    if not certain and not attempts.has_cause(notes) and (dead := find_dead(actors)):
        why, certain = _deaths(dead), True
    attempts.record_end(notes, why, "cause" if certain else "symptom")


def explain(error: BaseException) -> tuple[str, bool]:
    """Return in one line why a group of workers ended, and True if that is certainly the cause.

    An exception of a worker is not certain: it may have been raised because another worker died.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    if died := _deaths(failures):
        return died, True
    for rank, failure in sorted(failures.items()):
        return f"worker {rank} failed: {_last_line(getattr(failure, 'cause', None) or failure)}", False
    if ranks := getattr(getattr(error, "preemption_info", None), "preempted_ranks", None):
        return f"the node of worker {', '.join(map(str, ranks))} was taken away", True
    return _last_line(error), False


def _deaths(failures: Mapping[int, BaseException]) -> str:
    reasons = {rank: reason_of_death(failure) for rank, failure in sorted(failures.items())}
    return "; ".join(f"worker {rank} died: {why}" for rank, why in reasons.items() if why)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]
