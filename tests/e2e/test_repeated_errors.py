"""Errors of workers that come back: tried again after progress, and ended for good without any."""

import pytest

from tests.support.command import TINY, Command, until
from tests.support.recording import Recording

pytestmark = pytest.mark.slow
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
TRAIN += ["--evaluate.every", "1000", "--optim.max-steps", "5000", "--optim.epochs", "1000"]


def test_an_error_after_progress_is_left_to_a_later_try_and_twice_the_same_ends_the_run(
    detr: Command, recording: Recording
) -> None:
    recording.pace(0.05)
    driver = detr.start(*TRAIN, "--cluster.max-failures", "0", "--track.run-name", "repeats")
    until(lambda: recording.last()[0] >= 12 or driver.poll() is not None, "a checkpoint and two steps")
    recording.fail(0, "no such key")
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 75, output
    assert "worker 0 failed: no such key; the newest saved step is 1" in output.splitlines()[-1], output

    output = detr("resume", "repeats", "--cluster.max-failures", "100", status=1)
    ended = (
        "worker 0 failed: no such key; the attempt before it ended with the same error and nothing was saved in between"
    )
    assert ended in output.splitlines()[-1], output
    assert "restart 2" not in output
    assert detr.runs_named("repeats") == ["FAILED"]
