"""One command that comes again and again: beside its run, after a kill, and after the end."""

import json
import os
import signal
import time
from pathlib import Path

import psutil

from tests.support.command import TINY, Command, kill, ray_workers, until
from tests.support.recording import Recording

STEPS = 60
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
TRAIN += ["--optim.max-steps", str(STEPS), "--evaluate.every", "100", "--run", "same"]


def hears(pid: int, number: int) -> bool:
    """Return True if a process has a handler for the signal."""
    (mask,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def interrupted(detr: Command, number: int, after_s: float) -> tuple[int, float]:
    """Start the command where SIGINT is ignored, and signal it some seconds after it has begun to hear signals.

    Return its exit status and how long it took to end.
    """
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a process that a script has started with `&`
    try:
        process = detr.start(*TRAIN)
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: hears(process.pid, number), "a handler of the signal")
    time.sleep(after_s)
    start = time.monotonic()
    process.send_signal(number)
    output, _ = process.communicate(timeout=600)
    print(f"signal {number} after {after_s} s: status {process.returncode}, {output.splitlines()[-1:]}")
    return process.returncode, time.monotonic() - start


def test_the_same_command_creates_continues_and_finds_one_run(detr: Command, recording: Recording) -> None:
    recording.pace(0.3)
    stops = [interrupted(detr, signal.SIGTERM, 0), interrupted(detr, signal.SIGINT, 3)]
    assert [status for status, _ in stops] == [75, 75]
    assert max(seconds for _, seconds in stops) < 120  # a busy machine needs ten times what an idle one does

    driver = detr.start(*TRAIN)
    checkpoints = detr.folder / "runs" / "same" / "checkpoints"
    until(lambda: driver.poll() is not None or any(checkpoints.glob("step-*/meta.json")), "a checkpoint")
    recording.pace(3)  # so that the run does not end before the second command comes
    second = detr(*TRAIN, status=75)
    assert f"is being trained by process {driver.pid} on" in second, second

    workers = ray_workers(driver.pid)
    kill(psutil.Process(driver.pid))
    driver.communicate()
    psutil.wait_procs(workers, timeout=200)
    assert detr.runs_named("same") == ["RUNNING"]
    assert "killed" in detr("runs", "same")
    assert detr.runs_named("same") == ["KILLED"]
    assert detr.tag("same", "detr.phase") == "killed"

    recording.pace(0)
    output = detr(*TRAIN)
    assert "continues at step" in output, output
    times = []
    for _ in range(4):
        start = time.monotonic()
        assert "is finished and registered as models:/detr-overfit/1" in detr(*TRAIN)
        times.append(time.monotonic() - start)
    print("seconds of the four other commands:", ", ".join(f"{seconds:.1f}" for seconds in times))
    assert max(times) < 120  # 2 s on an idle machine
    assert detr.runs_named("same") == ["FINISHED"]
    points = detr.points("same", "train/loss")
    assert points == sorted(set(points))
    assert points[-1] == STEPS
    assert os.listdir(detr.folder / "runs") == ["same"]
    record = json.loads((detr.folder / "runs" / "same" / "run.json").read_text())
    assert record["status"] == "finished"
