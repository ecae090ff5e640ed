"""The script for Slurm on stand-ins, with programs in the place of Python and Ray: signals, statuses, queueing again."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from jobs.clusters import find_cluster
from jobs.code import Code
from jobs.engines.slurm import SlurmEngine
from jobs.plan import Plan, make_plan
from jobs.refusals import read_request
from tests.support.in_process import ROOT
from tests.support.slurm import Slurm, reason_without_slurm

WORDS = ["train", "demo", "--run", "it"]
# Saves for a second when it is stopped; ends with the status that a file names.
PYTHON = """#!/bin/bash
trap 'echo saving; sleep 1; exit 75' TERM
echo "driver $*"
while [ ! -e "$WORK/status" ]; do sleep 0.1; done
exit "$(cat "$WORK/status")"
"""
RAY = """#!/bin/bash
[ "$1" = health-check ] && exit 0
echo "node $SLURM_NODEID: ray $*" >>"$WORK/nodes"
mkdir -p "$DETR_NODE_FOLDER/ray" && touch "$DETR_NODE_FOLDER/ray/log"
exec sleep 600
"""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Slurm]:
    if reason := reason_without_slurm():
        pytest.skip(reason)
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "venv"
    programs.mkdir()
    for name, text in (("python", PYTHON), ("ray", RAY)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "detr.toml").write_text(f"""
        [clusters.hpc]
        launcher = "slurm"
        nodes = {{count = 2, cpus = 3}}
        python = "{programs}/python"
        job_folder = "{tmp_path}/jobs"
        setup = ["export FROM_SETUP=yes"]
        """)
    made = Slurm(tmp_path / "slurm", {"HOME": str(tmp_path), "WORK": str(tmp_path)})
    monkeypatch.setenv("PATH", made.environment["PATH"])
    monkeypatch.setenv("STUB_SLURM", made.environment["STUB_SLURM"])
    yield made
    made.stop()


def planned(suffix: str = "12ab34cd") -> Plan:
    cluster = find_cluster("hpc")
    return make_plan(cluster, read_request(cluster, WORDS), Code(ROOT, "c", ("jobs/code.py",)), suffix, "")


def submit(suffix: str = "12ab34cd") -> str:
    return SlurmEngine().submit(planned(suffix), print)


def until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def log(folder: Path, job: str) -> str:
    path = folder / "jobs" / job / "log"
    return path.read_text() if path.exists() else ""


def test_a_stop_saves_and_queues_again_and_the_end_ends_the_nodes(slurm: Slurm, tmp_path: Path) -> None:
    job = submit()
    for start in (1, 2):
        until(lambda start=start: log(tmp_path, job).count("driver ") == start)  # type: ignore[misc]
        slurm.warn(job)
        until(lambda start=start: log(tmp_path, job).count("the job queues again") == start)  # type: ignore[misc]
    until(lambda: log(tmp_path, job).count("driver ") == 3 and len(nodes(tmp_path)) == 6)
    (tmp_path / "status").write_text("0")
    until(lambda: slurm.jobs()[0]["state"] == "COMPLETED")
    assert slurm.jobs()[0]["starts"] == 3
    assert log(tmp_path, job).count("saving") == 2
    assert "driver -P -m jobs.cli train demo --run it" in log(tmp_path, job)
    heads = [
        line for line in nodes(tmp_path) if line.startswith("node 0: ray start --head --node-ip-address 127.0.0.1 ")
    ]
    others = [
        line
        for line in nodes(tmp_path)
        if line.startswith(f"node 1: ray start --address 127.0.0.1:{port(slurm.first)} --num-cpus 3 ")
    ]
    assert (len(heads), len(others)) == (3, 3)
    assert (tmp_path / "jobs" / job / f"token-{slurm.first}").stat().st_mode & 0o077 == 0
    until(lambda: not left(tmp_path))


def test_a_written_script_runs_when_it_is_submitted_by_hand(slurm: Slurm, tmp_path: Path) -> None:
    plan = planned()
    (tmp_path / "mine.sh").write_text(SlurmEngine().render(plan))
    (tmp_path / "status").write_text("0")
    (command,) = SlurmEngine().by_hand(plan, str(tmp_path / "mine.sh"))
    subprocess.run(command, shell=True, check=True)
    until(lambda: slurm.jobs()[0]["state"] == "COMPLETED")
    assert "driver -P -m jobs.cli train demo --run it" in log(tmp_path, plan.job)
    job = SlurmEngine().status(find_cluster("hpc"), plan.job)  # type: ignore[arg-type]
    assert (job.state, job.run) == ("SUCCEEDED", "it")


def test_jobs_on_the_same_nodes_have_ports_and_folders_of_their_own(slurm: Slurm, tmp_path: Path) -> None:
    """Ray's own default ports and /tmp/ray are those of the machine."""
    submit("12ab34cd")
    submit("56ef78ab")
    numbers = (slurm.first, slurm.first + 1)
    folders = [node_folder(number) for number in numbers]
    until(lambda: len(nodes(tmp_path)) == 4 and all((folder / "ray/log").exists() for folder in folders))
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
    for number, folder in zip(numbers, folders, strict=True):
        own = [line for line in nodes(tmp_path) if f"--temp-dir {folder}/ray " in line]
        assert sorted(line[:6] for line in own) == ["node 0", "node 1"]
        assert all(f"--port {port(number)} " in line or f":{port(number)} " in line for line in own)
    free = ("--min-worker-port 0 --max-worker-port 0", "--dashboard-agent-listen-port 0")
    assert all(flags in line for line in nodes(tmp_path) for flags in free)
    (tmp_path / "status").write_text("0")
    until(lambda: [job["state"] for job in slurm.jobs()] == ["COMPLETED", "COMPLETED"])
    assert not any(folder.exists() for folder in folders)


def node_folder(number: int) -> Path:
    """The folder of a job on each node."""
    return Path(f"/tmp/detr-0-{number}")


def port(number: int) -> int:
    """The port of a job's Ray."""
    return 20000 + number % 5000


def nodes(folder: Path) -> list[str]:
    """What was asked of Ray on the nodes."""
    path = folder / "nodes"
    return path.read_text().splitlines() if path.exists() else []


def left(folder: Path) -> list[int]:
    """The processes of jobs that still run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("WORK") == str(folder):
                found.append(process.pid)
    return found


@pytest.mark.parametrize(("status", "state"), [("0", "COMPLETED"), ("1", "FAILED"), ("143", "FAILED")])
def test_other_statuses_do_not_queue_again(slurm: Slurm, tmp_path: Path, status: str, state: str) -> None:
    job, kept = submit(), node_folder(slurm.first)
    until(lambda: len(nodes(tmp_path)) == 2 and (kept / "ray/log").exists())
    (tmp_path / "status").write_text(status)
    until(lambda: slurm.jobs()[0]["state"] == state)
    assert slurm.jobs()[0]["starts"] == 1
    assert "queues again" not in log(tmp_path, job)
    assert kept.exists() is (state == "FAILED")  # with Ray's logs
    shutil.rmtree(kept, ignore_errors=True)


def test_jobs_stop_saves_and_does_not_queue_again(slurm: Slurm, tmp_path: Path) -> None:
    job = submit()
    until(lambda: "driver " in log(tmp_path, job))
    cluster = find_cluster("hpc")
    assert SlurmEngine().stop(cluster, job) == f"{job} stopped"  # type: ignore[arg-type]
    assert slurm.jobs()[0]["starts"] == 1
    assert "saving" in log(tmp_path, job)
