"""Signals that meet all of a run's processes at once, as terminals and schedulers send them."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import psutil
import pytest

from tests.support.command import TINY, Command

pytestmark = pytest.mark.slow
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
TRAIN += ["--evaluate.every", "1000", "--optim.max-steps", "5000", "--optim.epochs", "1000"]


def start(detr: Command, *words: str) -> "subprocess.Popen[str]":
    """Like `Command.start`, in a session of its own: a group of which a test can signal all."""
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *words],
        cwd=detr.folder,
        env=detr.env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    detr.started.append(process)
    return process


def stopped(driver: "subprocess.Popen[str]", below: list[psutil.Process]) -> str:
    """Its output, if it ends as a run that was stopped does, and leaves no process behind."""
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 75, output
    assert "detr resume" in output.splitlines()[-1], output
    assert "did not answer" not in output, output  # else it gave the workers up
    _, alive = psutil.wait_procs(below, timeout=200)
    assert not alive
    return output


def test_a_signal_to_the_group_or_to_every_process_ends_in_a_stop(detr: Command) -> None:
    driver = start(detr, *TRAIN, "--track.run-name", "stopped")
    detr.wait_for_checkpoint("stopped", 20)
    below = psutil.Process(driver.pid).children(recursive=True)
    os.killpg(driver.pid, signal.SIGTERM)
    output = stopped(driver, below)
    assert "failed" not in output
    (run,) = detr.folder.glob("runs/stopped-*")
    saved = max(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-????????"))
    assert detr.points("stopped", "train/loss")[-1] == saved

    driver = start(detr, "resume", "stopped")
    detr.wait_for_checkpoint("stopped", saved + 20)
    below = psutil.Process(driver.pid).children(recursive=True)
    # The node's server first, so that the driver hears of the node's end, which is the worst order.
    for process in (psutil.Process(driver.pid), *sorted(below, key=lambda process: process.name() != "raylet")):
        with suppress(psutil.NoSuchProcess):  # some end with those that were signalled before
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2 if process.name() == "raylet" else 0)
    assert "training failed" not in stopped(driver, below)
    assert detr.runs_named("stopped") == ["KILLED"]
