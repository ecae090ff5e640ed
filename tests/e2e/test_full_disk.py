"""A disk for checkpoints that is full in the middle of a run: one line, and the run goes on when there is room."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.support.command import TINY, Command
from tests.support.small_disk import mounted, remount, run_on
from tests.support.tiny_data import TinyData

HERE = "tests.e2e.test_full_disk"


def outlive(folder: str, disk: str, train: str, val: str) -> None:
    """Print what `detr train` says, the whole checkpoints it leaves, and what `detr resume` says once there is room."""
    detr = Command(Path(folder))
    data = ["--data.train", train, "--data.val", val, "--checkpoint.store", disk, "--checkpoint.keep", "99"]
    options = [*data, "--optim.max-steps", "60", "--checkpoint.every-steps", "4", "--track.run-name", "full"]
    print(detr("train", "overfit", *TINY, *options, status=1))
    print("LEFT", *sorted(path.name for path in Path(disk).glob("full-*/checkpoints/*")))
    remount(Path(disk), "size=200m")
    print(detr("resume", "full"))


@pytest.mark.slow
@pytest.mark.usefixtures("store")  # with its schema made, in `tmp_path`
def test_a_full_disk_ends_a_run_with_one_line_and_resume_continues_it(tiny_data: TinyData, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    output = run_on(mounted({disk: 16}), f"{HERE}:outlive", str(tmp_path), str(disk), tiny_data.train, tiny_data.val)
    trained, _, rest = output.partition("LEFT")
    left, *resumed = rest.splitlines()
    (line,) = [text for text in trained.splitlines() if text.startswith("detr: ")]
    assert "No space left on device" in line
    assert "Traceback" not in output
    names = left.split()
    steps = [int(name.removeprefix("step-")) for name in names]  # nothing partial among them
    assert len(steps) >= 2
    assert f"continues at step {steps[-1]} of 60" in "\n".join(resumed)
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert list(database.execute("select status from runs where name = 'full'")) == [("FINISHED",)]
