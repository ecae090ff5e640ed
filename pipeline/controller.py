"""What Ray's controller of the workers tells us: why a group of them ended, and that another number is about to start.

The controller is an actor of Ray's on the driver's machine. Ray calls these methods there, between two looks at the
workers; what they learn lies in the run's folder, where the next group and the driver find it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback

from pipeline import attempts
from pipeline.errors import first_line
from pipeline.stopping import ask_to_yield, asked_to_yield, yielded

_YIELD_S = 120.0  # for the step, or the evaluation, that the workers are at, and the checkpoint
_LOOK_S = 0.2


class GroupNotes(ControllerCallback):  # type: ignore[misc]
    """Notes why groups of workers end, and lets one that is to be replaced save first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Ray calls it; states are known by the names of their classes."""
        state = type(current_state).__name__
        if state == "ResizingState":
            self._let_save(current_state.scaling_decision.num_workers)
        ends_with = getattr(current_state, "next_state", None) if state == "ShuttingDownState" else current_state
        error = getattr(ends_with, "training_failed_error", None)
        if error is not None and state in ("RestartingState", "ShuttingDownState"):
            note(self._folder, error)

    def _let_save(self, workers: int) -> None:
        """The workers run well, but there is room for another number of them: ask these to save and return."""
        if not attempts.begun(self._folder):
            return
        attempts.end(self._folder, f"the cluster has room for {workers} workers now", wanted=True)
        ask_to_yield(self._folder)
        until = time.monotonic() + _YIELD_S
        while asked_to_yield(self._folder) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        yielded(self._folder)


def note(folder: Path, error: BaseException) -> None:
    """Leave word why the group of workers ended, as far as Ray knows."""
    why, certain = explain(error)
    attempts.end(folder, why, "cause" if certain else "consequence")


def explain(error: BaseException) -> tuple[str, bool]:
    """Why a group of workers ended, in one line, and whether that is the cause: what a worker raises may be what it
    met when another died.
    """
    failures: dict[int, BaseException] = getattr(error, "worker_failures", None) or {}
    died = {rank: _death(failure) for rank, failure in sorted(failures.items())}
    if any(died.values()):
        return "; ".join(f"worker {rank} died: {why}" for rank, why in died.items() if why), True
    for rank, failure in sorted(failures.items()):
        return f"worker {rank} failed: {_last_line(getattr(failure, 'cause', None) or failure)}", False
    if ranks := getattr(getattr(error, "preemption_info", None), "preempted_ranks", None):
        return f"the node of worker {', '.join(map(str, ranks))} was taken away", True
    return _last_line(error), False


def _death(failure: BaseException) -> str:
    """Ray's own words for the death of a worker's process or node, without its boilerplate; empty if it lives."""
    cause = getattr(failure, "health_check_failure", None)
    if cause is None:
        return ""
    if type(cause).__name__ == "ActorUnavailableError":
        return "its process or its node does not answer"
    lines = [line.strip() for line in str(cause).splitlines()]
    said = " ".join(line for line in lines if line and not re.match(r"\w+: ", line) and "before finishing" not in line)
    said = said.partition("Worker exit detail: ")[2] or said
    # A guess at several causes follows where Ray knows none.
    said, guess, _ = said.partition(" Some common causes")
    if guess:
        said += " It was killed, it crashed, or its machine ran out of memory (dmesg there says so)."
    return (said or first_line(cause))[:400].rstrip(".")


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]
