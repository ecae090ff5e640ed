"""The job that a driver runs in: its tags, and its output on the way to MLflow."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from pipeline.driver import job
from pipeline.driver.job import JobLog, Output, job_tags
from pipeline.tracking.tags import TAG_CLUSTER, TAG_JOB, TAG_JOB_ID


class Artifacts:
    """Client that keeps texts; `fault` makes it fail."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.fault = False

    def log_text(self, run_id: str, text: str, path: str) -> None:
        if self.fault:
            raise MlflowException("away")
        self.texts[path] = text

    def list_artifacts(self, run_id: str, path: str) -> list[Any]:
        return [SimpleNamespace(path=name) for name in self.texts]


def test_a_run_knows_its_job() -> None:
    job = {"DETR_JOB": "it-1a2b", "DETR_CLUSTER": "lab", "SLURM_JOB_ID": "77"}
    assert job_tags(job) == {TAG_JOB: "it-1a2b", TAG_JOB_ID: "77", TAG_CLUSTER: "lab"}
    assert job_tags({"SLURM_JOB_ID": "77"}) == {}


def test_long_output_keeps_its_beginning_and_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_HEAD", 10)
    monkeypatch.setattr(job, "_TAIL", 20)
    output = Output()
    for number in range(100):
        output.add(f"line {number:02}\n".encode())
    text = output.text()
    assert text.startswith("line 00\nli")
    assert text.endswith("line 98\nline 99\n")
    assert "bytes left out" in text
    assert len(text) < 80
    assert output.size == 800


def test_an_outage_delays_the_output_and_each_attempt_has_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    client: Any = Artifacts()
    client.texts["logs/it.log"] = "first attempt"
    client.fault = True
    log = JobLog("it")
    log.output.add(b"one\n")
    log._target = client, "run"
    log.send()
    client.fault = False
    log.output.add(b"two\n")
    log.send()
    assert client.texts == {"logs/it.log": "first attempt", "logs/it.2.log": "one\ntwo\n"}
    client.texts.clear()
    log.send()
    assert client.texts == {}  # there was nothing new


def test_no_error_of_sending_reaches_the_run() -> None:
    def broken(*_: str) -> None:
        raise RuntimeError("a bug of a client")

    client: Any = SimpleNamespace(log_text=broken, list_artifacts=lambda *_: [])
    log = JobLog("it")
    log.output.add(b"one\n")
    log._target = client, "run"
    log.send()


def test_an_unexpected_error_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETR_JOB", "it-1a2b")
    outputs: list[Output] = []

    def fail() -> None:
        with job.job_output():
            assert job._log is not None
            outputs.append(job._log.output)
            raise ZeroDivisionError("a bug of this project")

    with pytest.raises(ZeroDivisionError):
        fail()
    kept = outputs[0].text()
    assert "Traceback" in kept
    assert "a bug of this project" in kept


def test_a_job_whose_reader_is_gone_does_not_block() -> None:
    script = (
        "import os\n"
        "from pipeline.driver import job\n"
        "output = job.Output()\n"
        "with job._copied(1, output):\n"
        "    for _ in range(64): os.write(1, b'x' * 4096)\n"
        "assert output.size == 64 * 4096\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(Path(job.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=writing, stderr=-1, timeout=60)
    os.close(writing)
    assert done.returncode == 0, done.stderr


def test_all_that_a_job_prints_is_kept_and_printed(tmp_path: Path) -> None:
    script = (
        "import subprocess, sys\n"
        "from pathlib import Path\n"
        "from pipeline.driver import job\n"
        "class Client:\n"
        "    def log_text(self, run_id, text, path): Path(path.replace('/', '-')).write_text(text)\n"
        "    def list_artifacts(self, run_id, path): return []\n"
        "with job.job_output():\n"
        "    print('before the run')\n"
        "    job.keep_output(Client(), 'run')\n"
        "    print('warning', file=sys.stderr)\n"
        "    sys.stdout.flush()\n"
        "    subprocess.run(['echo', 'of a child'])\n"
        "    print('last line')\n"
    )
    root = Path(job.__file__).parents[2]
    environment = {**os.environ, "DETR_JOB": "it-1a2b", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["before the run", "of a child", "last line"]
    assert "warning" in done.stderr
    kept = (tmp_path / "logs-it-1a2b.log").read_text().splitlines()
    assert set(kept) >= {"before the run", "warning", "of a child", "last line"}
