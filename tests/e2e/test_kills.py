"""Runs whose processes and nodes are killed at random steps, and one of whose workers hangs."""

import os
import re
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.support.command import TINY, Command, until
from tests.support.kills import KilledRun, plan
from tests.support.recording import Recording

pytestmark = pytest.mark.slow
STEPS = 40
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
TRAIN += ["--optim.max-steps", str(STEPS), "--evaluate.every", "100"]


@pytest.mark.parametrize("seed", [5])
def test_the_same_command_after_random_kills_makes_the_undisturbed_run(
    seed: int, detr: Command, tmp_path: Path
) -> None:
    """`python -m tests.bench.kills` does the same with other seeds and more kills."""
    shutil.copy(detr.folder / "mlflow.db", tmp_path)
    run = KilledRun(tmp_path, detr.folder / "data", str(tmp_path / "runs"), 3, {}, print)
    report = run.survive(plan(seed, 3))
    assert not report.problems, report
    assert report.attempts > 1, report


def test_a_worker_that_hangs_is_named_and_the_run_continues(detr: Command, recording: Recording) -> None:
    recording.pace(0.05)
    driver = detr.start(*TRAIN, "--track.run-name", "hung", "--cluster.collective-timeout-s", "15")
    until(lambda: recording.last()[0] >= 12 or driver.poll() is not None, "step 12")
    recording.pace(2)  # so that the run does not end before its worker hangs
    pid = next(int(path.name) for path in recording.folder.glob("[0-9]*") if path.read_text().split()[1] == "1")
    os.kill(pid, signal.SIGSTOP)
    recording.pace(0)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, output
    named = (
        r"warning: worker 1 does not respond; no step has ended for 1\d s, the last was step \d+; restart 1, resumed"
    )
    assert re.search(named, output), output
    assert not psutil.pid_exists(pid)
    assert [one.ranks for one in recording.kept()] == [2] * STEPS
