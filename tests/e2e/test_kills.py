"""Runs whose processes are killed at random steps, and one of whose workers hangs."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch

from tests.support.command import TINY, Command, config_of, kill, newest_weights, ray_workers, train_alone, until
from tests.support.recording import Recording

pytestmark = pytest.mark.slow
STEPS = 120
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
TRAIN += ["--optim.max-steps", str(STEPS), "--evaluate.every", "100"]


def gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=120)
    assert not alive, alive


def reach(recording: Recording, driver: "subprocess.Popen[str]", step: int) -> None:
    until(lambda: recording.last()[0] >= step or driver.poll() is not None, f"step {step}")


def newest(recording: Recording) -> float:
    """When the newest process that has taken a step began."""
    return max(line.since for line in recording.lines())


def test_kills_of_worker_driver_and_both_at_random_steps_change_no_weight(
    detr: Command, recording: Recording, tmp_path: Path
) -> None:
    seed = int(os.environ.get("DETR_TEST_SEED", time.time_ns() % 100_000))
    print(f"DETR_TEST_SEED={seed}")
    chance = random.Random(seed)
    kinds, steps = chance.sample(["worker", "driver", "both"], 3), sorted(chance.sample(range(15, STEPS - 40), 3))
    recording.pace(0.05)
    left: list[psutil.Process] = []
    driver = detr.start(*TRAIN, "--track.run-name", "killed")
    for kind, step in zip(kinds, steps, strict=True):
        reach(recording, driver, step)
        before = newest(recording)
        workers, below = ray_workers(driver.pid), psutil.Process(driver.pid).children(recursive=True)
        if kind != "driver":
            kill(chance.choice(workers))
        if kind != "worker":
            kill(psutil.Process(driver.pid))
            driver.communicate()
            gone(workers)
            left += below  # Ray's own take a minute or two to find out
            driver = detr.start("resume", "killed")
        while newest(recording) <= before and driver.poll() is None:
            time.sleep(0.1)
    output, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0, output
    assert len({line.group for line in recording.lines()}) == 4, "not all kills met a run at work"

    (folder,) = detr.folder.glob("runs/killed-*")
    config = config_of(detr.folder, "killed")
    points = train_alone(config, folder, tmp_path)
    disturbed, undisturbed = newest_weights(config, folder), newest_weights(config, tmp_path)
    assert disturbed.keys() == undisturbed.keys()
    assert all(torch.equal(value, undisturbed[name]) for name, value in disturbed.items())
    assert detr.points("killed", "train/loss") == [step for name, _, step in points if name == "train/loss"]
    gone(left)


def test_a_worker_that_hangs_is_named_and_the_run_continues(detr: Command, recording: Recording) -> None:
    recording.pace(0.05)
    driver = detr.start(*TRAIN, "--track.run-name", "hung", "--cluster.collective-timeout-s", "15")
    reach(recording, driver, 30)
    pid = next(int(path.name) for path in recording.folder.glob("[0-9]*") if path.read_text().split()[1] == "1")
    os.kill(pid, signal.SIGSTOP)
    output, _ = driver.communicate(timeout=200)
    assert driver.returncode == 0, output
    named = (
        r"warning: worker 1 does not respond; no step has ended for 1\d s, the last was step \d+; restart 1, resumed"
    )
    assert re.search(named, output), output
    assert not psutil.pid_exists(pid)
    assert [one.ranks for one in recording.kept()] == [2] * STEPS
