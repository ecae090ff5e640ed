"""Jobs that were submitted: their table, their state with the run behind it, and output that the launcher has forgotten."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, TextIO

import pytest

import jobs.engines
import jobs.runs_of_jobs
import jobs.submit
from jobs.clusters import Ray
from jobs.commands.jobs import jobs_table
from jobs.engines import Job
from jobs.errors import JobError
from pipeline.errors import TrackingAway
from pipeline.tracking.progress import RunProgress
from pipeline.tracking.tags import TAG_EPOCHS, TAG_FOLDER, TAG_JOB, TAG_PENDING_WORKERS, TAG_PHASE, TAG_PROGRESS
from tests.support.in_process import Detr

COMMAND = "detr train demo --run it-1a2b --storage /shared/runs --optim.epochs 12"
RUN = SimpleNamespace(
    info=SimpleNamespace(run_name="it-1a2b", run_id="0123456789", experiment_id="4", status="RUNNING"),
    data=SimpleNamespace(
        tags={
            TAG_PHASE: "training",
            TAG_EPOCHS: "12",
            TAG_PROGRESS: RunProgress(300, 3.5).to_json(),
            TAG_PENDING_WORKERS: "waiting for 2 GPUs",
        }
    ),
)


class Launcher:
    """Engine with these jobs, whose output is gone."""

    def __init__(self, *jobs: Job) -> None:
        self.jobs = jobs

    def list(self, cluster: Any) -> Sequence[Job]:
        return self.jobs

    def status(self, cluster: Any, job: str) -> Job:
        found = next((known for known in self.jobs if known.id == job), None)
        if found is None:
            raise JobError(f"there is no job {job!r}")
        return found

    def logs(self, cluster: Any, job: str, stream: TextIO, *, follow: bool = False) -> None:
        self.status(cluster, job)
        stream.write("output of the launcher\n")


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    known = Launcher(
        Job("it-1a2b", "RUNNING", 1.8e9, COMMAND, "it-1a2b"),
        Job("wait-3c4d", "PENDING", None, COMMAND, "wait-3c4d", "no node has 8 GPUs"),
        Job("old-5e6f", "FAILED", 1.7e9, COMMAND, "it-1a2b", "exit status 1"),
        Job("mine", "SUCCEEDED", 1.7e9, "python mine.py"),
    )
    monkeypatch.setattr(jobs.engines, "engine_of", lambda _: known)
    return known


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The runs of MLflow by the filter that finds them."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(jobs.runs_of_jobs, "client_of", lambda _: None)
    monkeypatch.setattr(
        "pipeline.tracking.mlflow_runs.runs_where",
        lambda _, condition, limit: [found[condition]] if condition in found else [],
    )
    return found


def test_the_table_fits_the_terminal_and_a_waiting_job_says_why(launcher: Launcher) -> None:
    wide = jobs_table(launcher.jobs, 0)
    assert COMMAND in wide
    narrow = jobs_table(launcher.jobs, 80)
    assert max(map(len, narrow.splitlines())) <= 80
    lines = narrow.splitlines()
    assert lines[2].startswith("it-1a2b")
    assert lines[2].endswith("...")
    assert "no node has 8 GPUs" in lines[3]
    assert "exit status 1" in lines[4]


def test_the_state_comes_first_then_the_run(launcher: Launcher, runs: dict[str, Any], detr: Detr) -> None:
    runs[f"tags.`{TAG_JOB}` = 'it-1a2b'"] = RUN
    lines = detr("jobs", "status", "it-1a2b").out.splitlines()
    assert lines[0] == "RUNNING"
    assert "run        it-1a2b (01234567): training, epoch 3.5 of 12" in lines
    assert "warning    waiting for 2 GPUs" in lines
    assert any(line.startswith("in MLflow  http") and "0123456789" in line for line in lines)


def test_a_pending_job_says_why_and_that_it_has_no_run_yet(
    launcher: Launcher, runs: dict[str, Any], detr: Detr
) -> None:
    lines = detr("jobs", "status", "wait-3c4d").out.splitlines()
    assert lines[0] == "PENDING"
    assert "waits    no node has 8 GPUs" in lines
    assert "run      wait-3c4d, not in MLflow yet" in lines


def test_a_silent_mlflow_does_not_hide_the_state(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, detr: Detr
) -> None:
    def away(_: object) -> None:
        raise TrackingAway("MLflow does not answer")

    monkeypatch.setattr(jobs.runs_of_jobs, "client_of", away)
    result = detr("jobs", "status", "it-1a2b")
    assert (result.status, result.out.splitlines()[0]) == (0, "RUNNING")
    assert "it-1a2b: MLflow does not answer" in result.out


def test_output_that_the_launcher_has_forgotten_comes_from_the_run(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, detr: Detr
) -> None:
    monkeypatch.setattr(jobs.runs_of_jobs, "kept_log", lambda _, job: "kept\n" if job == "gone" else "")
    assert detr("jobs", "logs", "it-1a2b").out == "output of the launcher\n"
    kept = detr("jobs", "logs", "gone")
    assert (kept.status, kept.out) == (0, "kept\n")
    assert "there is no job 'gone'; this is what its run keeps" in kept.line
    assert detr("jobs", "logs", "never").status == 1


def test_an_ended_job_is_submitted_again_with_its_own_command(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, detr: Detr
) -> None:
    sent: list[Sequence[str]] = []
    monkeypatch.setattr(jobs.submit, "submit", lambda cluster, argv, say: sent.append(argv) or "new-7a8b")
    assert "submitted   new-7a8b to local" in detr("jobs", "resume", "old-5e6f").out
    assert sent == [COMMAND.split()[1:]]
    assert "is RUNNING; expected one that has ended" in detr("jobs", "resume", "it-1a2b").line
    assert "expected a job of `detr submit`" in detr("jobs", "resume", "mine").line
    assert len(sent) == 1


def test_a_job_whose_launcher_keeps_no_command_continues_its_run(
    launcher: Launcher, runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, detr: Detr
) -> None:
    """SkyPilot's queue has names and states only."""
    sent: list[Sequence[str]] = []
    monkeypatch.setattr(jobs.submit, "submit", lambda cluster, argv, say: sent.append(argv) or "new-7a8b")
    launcher.jobs = tuple(Job(name, "FAILED") for name in ("it-1a2b", "trial-9c0d", "evaluation-1"))
    launcher.jobs += (Job("another-2", "FAILED", run="theirs"),)
    tags = {TAG_FOLDER: "s3://bucket/runs/it-1a2b"}
    runs[f"tags.`{TAG_JOB}` = 'it-1a2b'"] = SimpleNamespace(data=SimpleNamespace(tags=tags))
    trial = SimpleNamespace(data=SimpleNamespace(tags=tags | {"mlflow.parentRunId": "0123"}))
    runs[f"tags.`{TAG_JOB}` = 'trial-9c0d'"] = trial
    assert "submitted   new-7a8b" in detr("jobs", "resume", "it-1a2b").out
    assert sent == [["resume", "s3://bucket/runs/it-1a2b"]]
    runs["attributes.run_name = 'theirs'"] = runs[f"tags.`{TAG_JOB}` = 'it-1a2b'"]
    for job in ("trial-9c0d", "evaluation-1", "another-2"):
        assert f"does not know the command of job {job}" in detr("jobs", "resume", job).line
    assert len(sent) == 1


@pytest.mark.parametrize(("storage", "found"), [("s3://bucket/runs/", True), ("s3://bucket/run", False), ("", False)])
def test_a_run_that_is_found_by_its_name_must_be_in_the_storage_of_the_entry(
    storage: str, found: bool, runs: dict[str, Any]
) -> None:
    tags = {TAG_FOLDER: "s3://bucket/runs/it"}
    runs["attributes.run_name = 'it'"] = SimpleNamespace(data=SimpleNamespace(tags=tags))
    lab = Ray(name="lab", address="http://head:8265", storage=storage)
    words = jobs.runs_of_jobs.command_of_run(lab, Job("job-1", "FAILED", run="it"))
    assert words == (["detr", "resume", "s3://bucket/runs/it"] if found else [])
