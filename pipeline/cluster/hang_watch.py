"""Detection of hung workers: report which worker is stuck, and where, before the collective times out.

Workers take their steps together, so a hung worker stops all of them. After `cluster.collective_timeout_s` the waiting
collective fails (gloo raises, NCCL ends the process) and Ray restarts the workers, but neither knows which worker was
missing. So a thread in each worker records the position of the training thread when no step has finished for most of
that time. The hung worker is the one that records nothing, or whose position is not in a collective.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType

import msgspec

from pipeline.cluster.notes import attempts
from pipeline.cluster.notes.notes import Notes
from pipeline.training.step import train_step

_RECORD, _JUDGE = 0.7, 0.85  # fractions of the timeout: first every worker records its position, then they are compared
_ROOT = Path(__file__).parents[2]
_OUR_PACKAGES = tuple(f"{_ROOT / package}/" for package in ("pipeline", "shards", "detr"))
# A worker that waits for others is in a collective, or in the backward pass, which averages gradients.
_WAITING_PATHS = ("torch/distributed/", "torch/autograd/", "torch/nn/parallel/")
# With NCCL a collective returns at once; the host then waits in this function, where it reads the step's results.
_WAITING_CODE = train_step.__code__
_MAX_NAMED = 4  # workers named in the report


class ThreadPosition(msgspec.Struct, frozen=True):
    """Position of a worker's training thread: steps done, innermost function of our own, and if it waits for others."""

    step: int
    where: str
    waits: bool


class HangWatch:
    """Watcher of the thread that creates it; runs in a thread of its own until it is closed."""

    def __init__(self, notes: Notes, rank: int, world_size: int, timeout_s: float) -> None:
        self._notes, self._rank, self._world_size, self._timeout_s = notes, rank, world_size, timeout_s
        self._training_thread = threading.get_ident()
        self._step, self._since, self._recorded = -1, time.monotonic(), False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hangs", daemon=True)
        if world_size > 1:
            self._thread.start()

    def stepped(self, step: int) -> None:
        """Note that `step` steps are done."""
        self._step, self._since = step, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._timeout_s / 40)):
            quiet_s = time.monotonic() - self._since
            if quiet_s <= _RECORD * self._timeout_s and self._recorded:
                self._recorded = False
                attempts.clear_hang(self._notes, self._rank)
            if quiet_s > _RECORD * self._timeout_s and not self._recorded:
                self._recorded = True
                frame = sys._current_frames().get(self._training_thread)
                attempts.record_position(self._notes, self._rank, thread_position(frame, self._step))
            if quiet_s > _JUDGE * self._timeout_s and self._recorded:
                positions = attempts.read_positions(self._notes, self._world_size, ThreadPosition)
                attempts.record_end(self._notes, diagnose(positions, quiet_s), "hang")


def thread_position(frame: FrameType | None, step: int) -> ThreadPosition:
    """Return the position of a thread from its innermost frame; `step`: steps it has done."""
    waits = False
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_OUR_PACKAGES):
            location = f"{Path(code.co_filename).relative_to(_ROOT)}:{frame.f_lineno}"
            return ThreadPosition(step, f"{code.co_name} ({location})", waits or code is _WAITING_CODE)
        waits |= any(path in code.co_filename for path in _WAITING_PATHS)
        frame = frame.f_back
    return ThreadPosition(step, "no code of ours", waits)


def diagnose(positions: dict[int, ThreadPosition | None], quiet_s: float) -> str:
    """Return one line that names the hung workers and their positions; `positions` has None for a silent worker."""
    known = {rank: position for rank, position in positions.items() if position is not None}
    last = max((position.step for position in known.values()), default=0)
    silent = [f"worker {rank} does not respond" for rank in positions if rank not in known]
    behind = [rank for rank, position in known.items() if position.step < last]
    busy = [rank for rank, position in known.items() if not position.waits]
    hung = [f"worker {rank} hangs in {known[rank].where}" for rank in behind or busy]
    if silent:
        found = silent
    elif 0 < len(hung) < len(known):
        found = hung
    else:
        found = [
            "the workers wait for each other",
            *(f"worker {rank} in {position.where}" for rank, position in known.items()),
        ]
    more = f" and {len(found) - _MAX_NAMED} more" if len(found) > _MAX_NAMED else ""
    return f"{', '.join(found[:_MAX_NAMED])}{more}; no step has ended for {quiet_s:.0f} s, the last was step {last}"
