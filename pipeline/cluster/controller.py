"""Callback of Ray's controller: record why a group of workers ended, and let it save before a resize.

The controller is an actor of Ray on the driver's machine, which calls these methods between two polls of the workers.
They write to the run's folder, where the next group and the driver read it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.cluster import attempts
from pipeline.cluster.deaths import find_dead, reason_of_death
from pipeline.cluster.ray_internals import ControllerCallback, WorkerGroupCallback
from pipeline.run_folder import clear_handover, handover_requested, request_handover

_LOOK_S = 0.2


class GroupEndCallback(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Callback that records why groups of workers end, and lets a group save before it is replaced."""

    def __init__(self, folder: Path, handover_s: float = 120.0) -> None:
        # By default time for a step or an evaluation, and for the checkpoint.
        self._folder, self._handover_s = folder, handover_s
        self._actors: dict[int, Any] = {}

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
            record_group_end(self._folder, error, self._actors)

    def _let_save(self, workers: int) -> None:
        """Ask the workers, which run well, to save and return because `workers` of them will replace them."""
        if not attempts.has_started(self._folder):
            return
        attempts.record_end(self._folder, f"the cluster has resources for {workers} workers now", wanted=True)
        request_handover(self._folder)
        until = time.monotonic() + self._handover_s
        while handover_requested(self._folder) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        clear_handover(self._folder)


def record_group_end(folder: Path, error: BaseException, actors: Mapping[int, Any]) -> None:
    """Record why the group of workers, `actors` by rank, ended, as far as Ray knows or finds out by asking them."""
    why, certain = explain(error)
    if not certain and not attempts.has_cause(folder) and (dead := find_dead(actors)):
        why, certain = _deaths(dead), True
    attempts.record_end(folder, why, "cause" if certain else "symptom")


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
