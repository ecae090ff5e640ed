"""Outages of a real MLflow server at the start, in the middle, at the end and to the end of a run: nothing is lost."""

import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.command import TINY, Command, until
from tests.support.mlflow_server import MlflowServer
from tests.support.recording import Recording
from tests.support.undisturbed import differences

pytestmark = pytest.mark.slow
STEPS = 60
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY, "--optim.epochs", "10"]
TRAIN += ["--cluster.workers", "1", "--track.system-every-s", "1"]
AWAY = r"MLflow does not answer since \d\d:\d\d \(connection refused\); training continues, nothing is lost"


class Output:
    """Lines that a process prints, as they come."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process, self.lines = process, list[str]()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it; fail with what was printed if the process ends before."""
        until(lambda: condition() or self._process.poll() is not None, f"{what}, after {self.lines}")
        assert condition(), self.text

    @property
    def text(self) -> str:
        """Everything so far."""
        return "".join(self.lines)

    def at_end(self, status: int) -> str:
        """Everything, after the process has ended with `status`."""
        self._process.wait(600)
        self._thread.join(60)
        assert self._process.returncode == status, self.text
        return self.text


@pytest.fixture
def server(detr: Command) -> Iterator[MlflowServer]:
    """A server over the store in the command's folder."""
    started = MlflowServer(detr.folder, f"sqlite:///{detr.folder / 'mlflow.db'}")
    before = dict(detr.env)
    detr.env["MLFLOW_TRACKING_URI"] = started.url
    yield started
    detr.env = before
    started.stop()


def trained(recording: Recording, output: Output, step: int) -> None:
    recording.pace(0.2)
    output.until(lambda: recording.last()[0] >= step, f"step {step}")
    recording.pace(5)  # so that the run does not end while the server starts or stops


def test_outages_at_the_start_in_the_middle_and_at_the_end_cost_no_point(
    detr: Command, server: MlflowServer, recording: Recording, tmp_path: Path
) -> None:
    output = Output(detr.start(*TRAIN, "--run", "outages"))
    output.until(lambda: "checkpoints in" in output.text, "the run in MLflow")
    server.stop()
    trained(recording, output, 4)
    output.until(lambda: bool(re.search(AWAY, output.text)), "the line about the outage")
    server.start()
    output.until(lambda: bool(detr.points("outages", "train/loss")), "points after an outage")
    output.until(lambda: output.text.count("answers again") == 1, "the end of the outage")
    server.stop()
    trained(recording, output, recording.last()[0] + 6)
    output.until(lambda: len(re.findall(AWAY, output.text)) == 2, "the line about the second outage")
    server.start()
    output.until(lambda: output.text.count("answers again") == 2, "the end of the second outage")
    server.stop()
    recording.pace(0)
    output.until(lambda: "the registration waits" in output.text, "the end of training")
    server.start()
    text = output.at_end(0)
    assert len(re.findall(AWAY, text)) >= 2, text
    assert len(re.findall(r"MLflow answers again after \d+ s", text)) >= 3, text
    assert "does not answer (connection refused); the run is trained and everything is kept" in text
    assert "HTTPConnectionPool" not in text
    assert differences(detr.folder / "runs" / "outages", detr.folder / "mlflow.db", tmp_path / "alone")[0] == []
    assert detr.tag("outages", "detr.phase") == "finished"
    load = detr.points("outages", "system/" + _node(detr) + "/cpu_utilization_percentage")
    assert load == sorted(set(load))
    assert len(load) > 5


def test_a_run_without_mlflow_to_its_end_is_sent_by_sync_and_registered_by_resume(
    detr: Command, server: MlflowServer, recording: Recording, tmp_path: Path
) -> None:
    output = Output(detr.start(*TRAIN, "--run", "beyond", "--track.wait-s", "2"))
    trained(recording, output, 3)
    server.stop()
    recording.pace(0)
    text = output.at_end(75)
    assert re.search(AWAY, text), text
    assert text.splitlines()[-1].startswith("detr: MLflow at http://127.0.0.1:")
    assert "`detr resume beyond`, or the same command, continues" in text.splitlines()[-1]
    server.start()
    sent = detr("sync", "beyond")
    assert re.search(r"sent \d+ events of run beyond; .*`detr resume beyond` continues it", sent), sent
    assert detr.points("beyond", "train/loss")[-1] == STEPS
    assert "nothing was left to send" in detr("sync", "beyond")
    assert detr.tag("beyond", "detr.phase") == "killed"
    detr("resume", "beyond")
    assert differences(detr.folder / "runs" / "beyond", detr.folder / "mlflow.db", tmp_path / "alone")[0] == []


def _node(detr: Command) -> str:
    """Return the node whose load the run reports."""
    import sqlite3

    with sqlite3.connect(detr.folder / "mlflow.db") as database:
        (key,) = database.execute("select key from metrics where key like 'system/%/cpu%' limit 1").fetchone()
    return str(key).split("/")[1]
