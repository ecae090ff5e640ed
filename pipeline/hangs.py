"""Who keeps the others waiting, said before the wait is over.

Workers take their steps together, so one that hangs stops all. After `cluster.collective_timeout_s` the waiting collective
fails (gloo raises, NCCL ends the process) and Ray starts the group again, but neither knows who did not come. So a thread
of each worker, when no step has ended for most of that time, writes down where the training thread stands. The worker that
writes nothing, or stands elsewhere than in a collective, is the one.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType

import msgspec

from pipeline import attempts

_NOTE, _JUDGE = 0.7, 0.85  # of the timeout: first all say where they stand, then whoever can reads it
_ROOT = Path(__file__).parents[1]
_OURS = tuple(f"{_ROOT / package}/" for package in ("pipeline", "shards", "detr"))
# Where a worker stands that waits for others: in a collective, in the backward pass that averages gradients, or for its
# device, which is in either.
_WAITING = ("torch/distributed/", "torch/autograd/", "torch/nn/parallel/")
_TOLD = 4  # of many that hang


class Standing(msgspec.Struct, frozen=True):
    """Where a worker's training thread is: so many steps done, in our own innermost function, waiting for others or not."""

    step: int
    where: str
    waits: bool


class HangWatch:
    """Watches the thread that builds it, from a thread of its own, until it is closed."""

    def __init__(self, run_folder: Path, rank: int, world_size: int, timeout_s: float) -> None:
        self._folder, self._rank, self._world_size, self._timeout_s = run_folder, rank, world_size, timeout_s
        self._training = threading.get_ident()
        self._step, self._since, self._noted = -1, time.monotonic(), False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hangs", daemon=True)
        if world_size > 1:
            self._thread.start()

    def stepped(self, step: int) -> None:
        """`step` steps are done."""
        self._step, self._since = step, time.monotonic()
        if self._noted:
            self._noted = False
            attempts.goes_on(self._folder, self._rank)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(5.0, self._timeout_s / 40)):
            quiet_s = time.monotonic() - self._since
            if quiet_s > _NOTE * self._timeout_s and not self._noted:
                self._noted = True
                attempts.stand(self._folder, self._rank, self._standing())
            if quiet_s > _JUDGE * self._timeout_s and self._noted:
                standings = attempts.standings(self._folder, self._world_size, Standing)
                attempts.end(self._folder, judge(standings, quiet_s), "hang")

    def _standing(self) -> Standing:
        return standing(sys._current_frames().get(self._training), self._step)


def standing(frame: FrameType | None, step: int) -> Standing:
    """Of a thread whose innermost frame is `frame`, after so many steps."""
    waits = False
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            # With NCCL a collective returns at once, and the host waits where it looks at the step's figures.
            waits |= frame.f_code.co_name == "train_step"
            place = f"{Path(path).relative_to(_ROOT)}:{frame.f_lineno}"
            return Standing(step, f"{frame.f_code.co_name} ({place})", waits)
        waits |= any(part in path for part in _WAITING)
        frame = frame.f_back
    return Standing(step, "no code of ours", waits)


def judge(standings: dict[int, Standing | None], quiet_s: float) -> str:
    """One line that names who hangs and where; a rank that says nothing has None."""
    said = {rank: one for rank, one in standings.items() if one is not None}
    last = max((one.step for one in said.values()), default=0)
    silent = [f"worker {rank} gives no sign of life" for rank, one in standings.items() if one is None]
    behind = [(rank, one) for rank, one in said.items() if one.step < last]
    busy = [(rank, one) for rank, one in said.items() if not one.waits]
    hanging = [f"worker {rank} hangs in {one.where}" for rank, one in behind or busy]
    found = silent or (hanging if len(hanging) < len(said) else [])
    if not found:
        found = ["the workers wait for each other"] + [f"worker {rank} in {one.where}" for rank, one in said.items()]
    more = f" and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    return f"{', '.join(found[:_TOLD])}{more}; no step has ended for {quiet_s:.0f} s, the last was step {last}"
