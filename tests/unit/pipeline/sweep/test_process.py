"""The process of a trial, what it hands to Ray Tune, and when it is stopped. The processes are real, Ray is not there."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from pipeline.sweep.process import ENDED, POINTS, Point, TrialProcess
from pipeline.sweep.watch import TrialFailed, reports

WAITS = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nprint('ready', flush=True)\ntime.sleep(600)"


def process_of(folder: Path, points: list[Point], total: int = 9) -> TrialProcess:
    return TrialProcess("it", folder / "it", total, lambda: points)


def wait_for(holds: Callable[[], bool]) -> None:
    for _ in range(600):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def test_reports_come_once_and_in_order_and_the_last_step_s_with_the_end(tmp_path: Path) -> None:
    points = [Point(6, 0.2), Point(3, 0.1), Point(9, 0.3)]
    trial = process_of(tmp_path, points)
    trial._look(ended=False)
    assert [point.step for point in trial.points] == [3, 6]
    trial._look(ended=False)
    trial._look(ended=True)
    trial._write_end(0)
    assert list(reports(trial.folder)) == [Point(3, 0.1), Point(6, 0.2), Point(9, 0.3)]


def test_a_half_written_point_waits(tmp_path: Path) -> None:
    line = msgspec.json.encode(Point(3, 0.5)) + b"\n"
    (tmp_path / POINTS).write_bytes(line[:5])

    def rest(_: float) -> None:
        (tmp_path / POINTS).write_bytes(line)
        (tmp_path / ENDED).write_text("0")

    assert list(reports(tmp_path, rest)) == [Point(3, 0.5)]


def test_a_process_that_failed_fails_its_trial_after_its_reports(tmp_path: Path) -> None:
    trial = process_of(tmp_path, [Point(3, 0.1)])
    trial.start([sys.executable, "-c", "import sys; print('detr: no such data'); sys.exit(1)"])
    found = []
    with pytest.raises(TrialFailed, match="1"):
        found += reports(trial.folder, lambda _: time.sleep(0.05))
    assert (trial.status, trial.last_line) == (1, "no such data")
    assert [point.step for point in trial.points] == [3]


def test_a_stopped_process_has_time_to_save(tmp_path: Path) -> None:
    trial = process_of(tmp_path, [])
    trial.start([sys.executable, "-c", WAITS])
    wait_for(lambda: trial.last_line == "ready")
    assert trial.runs
    trial.stop()
    assert (trial.status, (trial.folder / ENDED).read_text()) == (75, "75")


def test_a_trial_saves_when_its_sweep_is_killed(tmp_path: Path) -> None:
    sweep = (
        "import sys, time\nfrom pathlib import Path\nfrom pipeline.sweep.process import TrialProcess\n"
        f"trial = TrialProcess('it', Path({str(tmp_path / 'it')!r}), 9, lambda: [])\n"
        f"trial.start([sys.executable, '-c', {WAITS.replace('sys.exit(75)', 'print(chr(115), flush=True) or sys.exit(75)')!r}])\n"
        "print(trial._process.pid, flush=True)\ntime.sleep(600)"
    )
    killed = subprocess.Popen([sys.executable, "-c", sweep], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    try:
        child = int(killed.stdout.readline())
        log = tmp_path / "it" / "log"
        wait_for(lambda: "ready" in log.read_text())
    finally:
        killed.kill()
        killed.wait()
        killed.stdout.close()
    wait_for(lambda: "s" in log.read_text().split())  # it was asked to stop, and did
    wait_for(lambda: not _alive(child))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
