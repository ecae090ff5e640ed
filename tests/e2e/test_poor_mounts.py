"""Run, stop and messages on a shared folder without hard links and locks, whose new files others see a minute late."""

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.command import TINY, Command, until
from tests.support.recording import Recording

pytestmark = pytest.mark.slow
SOURCE = Path(__file__).parents[1] / "support" / "poor_mount.c"
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY, "--optim.epochs", "5"]
TRAIN += ["--cluster.workers", "2", "--run", "poor"]


@pytest.fixture
def poor_runs(detr: Command, recording: Recording, tmp_path: Path) -> Path:
    """The folder of runs, as every process of the command sees it through a library that is loaded before the C library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library, runs = tmp_path / "poor.so", detr.folder / "runs"
    words = [compiler, "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(words, check=True)
    detr.env |= {"LD_PRELOAD": str(library), "DETR_POOR_MOUNT": str(runs)}
    return runs


def test_a_run_stops_and_continues_without_links_and_locks(
    detr: Command, poor_runs: Path, recording: Recording
) -> None:
    recording.pace(0.3)
    driver = detr.start(*TRAIN)
    until(lambda: recording.last()[0] >= 5 or driver.poll() is not None, "5 steps")
    recording.pace(3)  # so that the run is not done before it is stopped
    busy = detr(*TRAIN, status=75)
    assert f"process {driver.pid}" in busy or f"pid {driver.pid}" in busy, busy
    driver.send_signal(signal.SIGINT)
    output, _ = driver.communicate(timeout=600)
    assert driver.returncode == 75, output
    assert "did not answer" not in output  # within the 45 s after which the workers are killed
    stopped_at = recording.last()[0]
    recording.pace(0)
    output = detr(*TRAIN)
    assert f"continues at step {stopped_at + 1}" in output or f"continues at step {stopped_at}" in output, output
    steps = recording.kept()
    assert len(steps) == 30
    assert detr.points("poor", "train/loss") == sorted(set(detr.points("poor", "train/loss")))
