"""The process of a trial: `detr train ... --run NAME`, followed until it ends.

The sweep's own process is the parent, not an actor of Ray, which kills the children of its actors with SIGKILL. What a
trial reports reaches the actor that stands for it in Ray Tune through two files in the scratch folder of this node:
`points`, a line for each evaluation, and `ended`, the exit status.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_LOOK_S = 2.0
_SAVE_S = 300.0
POINTS, ENDED, LOG = "points", "ended", "log"


class Point(msgspec.Struct, frozen=True):
    """Value of the metric after a step."""

    step: int
    value: float


class TrialProcess:
    """A trial that runs, or one that needs no process because it has ended before.

    points: returns all values of the metric that the run has reported so far.
    """

    def __init__(self, name: str, folder: Path, total_steps: int, points: Callable[[], Sequence[Point]]) -> None:
        self.name, self.folder = name, folder
        self.points: list[Point] = []
        self._total, self._read = total_steps, points
        self._process: subprocess.Popen[bytes] | None = None
        self._follower: threading.Thread | None = None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ENDED).unlink(missing_ok=True)
        (folder / POINTS).write_bytes(b"")

    @property
    def status(self) -> int | None:
        """Exit status, None while the process runs or if there was none."""
        return None if self._process is None else self._process.poll()

    @property
    def runs(self) -> bool:
        """True while the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def last_line(self) -> str:
        """Last line of the process's output, which says how it ended."""
        lines = (self.folder / LOG).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("detr: ") if lines else ""

    def start(self, command: Sequence[str]) -> None:
        """Start the process in a session of its own, so that Ctrl-C reaches the sweep alone.

        It is asked to stop when the sweep dies, even by SIGKILL. Call this in a thread that lives as long as the sweep.
        """
        with (self.folder / LOG).open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_stop_with_parent,
            )
        self._follower = threading.Thread(target=self._follow, name=f"trial {self.name}", daemon=True)
        self._follower.start()

    def replay(self) -> None:
        """Report what a trial that has ended before reported then."""
        self._look(ended=True)
        self._write_end(0)

    def ask_to_stop(self) -> None:
        """Ask the process to save and end."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Ask the process to save and end, and wait for that; kill it if it does not end."""
        self.ask_to_stop()
        self.wait()

    def wait(self) -> None:
        """Wait until the process has ended; kill it if that takes too long."""
        if self._process is not None:
            try:
                self._process.wait(_SAVE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._follower is not None:
            self._follower.join()

    def _follow(self) -> None:
        assert self._process is not None
        while True:
            try:
                status = self._process.wait(_LOOK_S)
            except subprocess.TimeoutExpired:
                self._look(ended=False)
                continue
            self._look(ended=True)
            self._write_end(status)
            return

    def _look(self, *, ended: bool) -> None:
        """Write down new values. That of the last step waits for the end, so that no trial is stopped while it ends."""
        known = self.points[-1].step if self.points else -1
        new = [point for point in self._read() if point.step > known and (ended or point.step < self._total)]
        new.sort(key=lambda point: point.step)
        self.points += new
        with (self.folder / POINTS).open("ab") as file:
            for point in new:
                file.write(msgspec.json.encode(point) + b"\n")

    def _write_end(self, status: int) -> None:
        partial = self.folder / f"{ENDED}.partial"
        partial.write_text(str(status))
        os.replace(partial, self.folder / ENDED)


def _stop_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
