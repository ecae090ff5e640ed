"""Thin calls of the launchers' own clients: what they are asked, and what their answers mean."""

import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.clusters import find_cluster
from jobs.code import Code
from jobs.engines import engine_of
from jobs.engines import ray as ray_engine
from jobs.errors import JobError
from jobs.plan import Plan, make_plan
from jobs.refusals import read_request
from tests.support.entries import FIXED, entry
from tests.support.in_process import ROOT

CODE = Code(ROOT, "0" * 40, ("jobs/code.py", "requirements.lock"))
WORDS = ["train", "detr-r50-16gpu", "--data.train", "s3://bucket/train", "--data.val", "s3://bucket/val"]
Program = Callable[[str, str], Callable[[], str]]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """A function that puts a program on PATH: `script` is its shell; it returns a function for what it was asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def make(name: str, script: str) -> Callable[[], str]:
        log = tmp_path / f"{name}.log"
        file = tmp_path / "bin" / name
        file.write_text(f'#!/bin/sh\necho "$@" >>{log}\n{script}\n')
        file.chmod(0o755)
        return lambda: log.read_text() if log.exists() else ""

    return make


def plan(folder: Path, launcher: str) -> Plan:
    text = entry(launcher, FIXED).replace("[clusters.it]\n", f"[clusters.it]\n{folder_line(folder, launcher)}")
    (folder / "detr.toml").write_text(text)
    cluster = find_cluster("it")
    return make_plan(cluster, read_request(cluster, WORDS), CODE, "12ab34cd", "")


def folder_line(folder: Path, launcher: str) -> str:
    return f'job_folder = "{folder}/jobs"\n' if launcher == "slurm" else ""


def rayjob(state: str, status: str = "", **more: Any) -> str:
    item = {
        "metadata": {
            "name": "run-1",
            "creationTimestamp": "2026-11-30T05:00:00Z",
            "annotations": {"detr/command": "detr train demo"},
        },
        "spec": {"entrypoint": "python", "metadata": {"run": "r"}},
        "status": {"jobDeploymentStatus": state, "jobStatus": status, "jobId": "id-1", "rayClusterName": "c-1", **more},
    }
    return json.dumps(item)


@pytest.mark.parametrize("launcher", ["kuberay", "slurm", "sky", "ray_up"])
def test_a_client_that_is_missing_is_one_clear_line(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    made = plan(tmp_path, launcher)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "it is set")
    with pytest.raises(
        JobError, match=r"the command `\w+` is not installed here; expected it: install it, or use --write FILE"
    ):
        engine_of(made.cluster).submit(made, print)


def test_a_client_that_fails_is_one_line_with_its_reason(tmp_path: Path, program: Program) -> None:
    program("kubectl", "echo line; echo 'error: no such context' >&2; exit 1")
    made = plan(tmp_path, "kuberay")
    with pytest.raises(
        JobError, match=r"^`kubectl --namespace=default .*` failed \(error: no such context\)"
    ) as caught:
        engine_of(made.cluster).submit(made, print)
    assert "\n" not in str(caught.value)


def test_kubectl_creates_the_manifest(tmp_path: Path, program: Program) -> None:
    asked = program("kubectl", f"cat >{tmp_path}/sent")
    made = plan(tmp_path, "kuberay")
    assert engine_of(made.cluster).submit(made, print) == made.job
    assert "create -f -" in asked()
    assert (tmp_path / "sent").read_text() == engine_of(made.cluster).render(made)


@pytest.mark.parametrize(
    ("state", "status", "expected"),
    [
        ("Initializing", "", "PENDING"),
        ("Running", "RUNNING", "RUNNING"),
        ("Complete", "SUCCEEDED", "SUCCEEDED"),
        ("Complete", "STOPPED", "STOPPED"),
        ("Failed", "FAILED", "FAILED"),
        ("Suspended", "", "PENDING"),
    ],
)
def test_state_of_a_rayjob(tmp_path: Path, program: Program, state: str, status: str, expected: str) -> None:
    program("kubectl", f"cat <<'X'\n{rayjob(state, status)}\nX")
    cluster = plan(tmp_path, "kuberay").cluster
    job = engine_of(cluster).status(cluster, "run-1")
    assert (job.state, job.command, job.run, job.started) == (expected, "detr train demo", "r", 1796014800.0)
    assert (job.reason == state) is (expected == "PENDING")


def test_a_running_rayjob_is_stopped_through_ray_so_that_it_saves(tmp_path: Path, program: Program) -> None:
    (tmp_path / "state").write_text(rayjob("Running", "RUNNING"))
    (tmp_path / "after").write_text(rayjob("Complete", "STOPPED"))
    script = f"""
case "$*" in
*"get rayjob"*) cat {tmp_path}/state ;;
*"get pod"*) echo pod/head-1 ;;
*exec*) cp {tmp_path}/after {tmp_path}/state ;;
esac"""
    asked = program("kubectl", script)
    cluster = plan(tmp_path, "kuberay").cluster
    assert engine_of(cluster).stop(cluster, "run-1") == "run-1 stopped"
    assert "get pod -l ray.io/cluster=c-1,ray.io/node-type=head" in asked()
    assert "exec pod/head-1 -- ray job stop id-1" in asked()


def test_slurm_gets_the_script_and_a_snapshot_in_the_folder_of_the_job(tmp_path: Path, program: Program) -> None:
    asked = program("sbatch", "echo '41;cluster'")
    made = plan(tmp_path, "slurm")
    lines: list[str] = []
    assert engine_of(made.cluster).submit(made, lines.append) == made.job
    folder = tmp_path / "jobs" / made.job
    assert asked() == f"--parsable {folder}/job.sh\n"
    assert (folder / "code" / "jobs" / "code.py").exists()
    assert any("Slurm's job 41" in line for line in lines)


def test_a_written_file_is_complete_and_its_commands_are_those_of_submit(tmp_path: Path, program: Program) -> None:
    """Slurm fails without a word where the folder of the log is missing."""
    made = plan(tmp_path, "slurm")
    assert engine_of(made.cluster).by_hand(made, "my job.sh") == ["sbatch 'my job.sh'"]
    folder = tmp_path / "jobs" / made.job
    assert (folder / "code" / "jobs" / "code.py").exists()
    assert (folder / "command").read_text() == f"{made.shown}\n{made.run}\n"
    assert f"#SBATCH --output={folder}/log\n" in engine_of(made.cluster).render(made)
    made = plan(tmp_path, "ray_up")
    start, job = engine_of(made.cluster).by_hand(made, "it.yaml")
    assert start == "ray up --yes --no-restart it.yaml"
    assert shlex.split(job)[:3] == ["ray", "exec", "it.yaml"]
    assert f"--submission-id {made.job}" in shlex.split(job)[3]
    made = plan(tmp_path, "kuberay")
    assert engine_of(made.cluster).by_hand(made, "it.yaml") == ["kubectl --namespace=default create -f it.yaml"]
    made = plan(tmp_path, "sky")
    assert engine_of(made.cluster).by_hand(made, "it.yaml")[-1].endswith("--secret RAY_AUTH_TOKEN it.yaml")


def test_a_folder_that_only_the_cluster_sees_is_made_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs").write_text("no folder can be made here")
    made = plan(tmp_path, "slurm")
    folder = tmp_path / "jobs" / made.job
    assert engine_of(made.cluster).by_hand(made, "job.sh") == [
        f"mkdir -p {folder}  # on the cluster, then copy this checkout to {folder}/code",
        "sbatch job.sh",
    ]


def test_state_and_log_of_a_slurm_job(tmp_path: Path, program: Program) -> None:
    cluster = plan(tmp_path, "slurm").cluster
    for name in ("a-1", "b-2", "c-3", "other"):
        program("squeue", "echo 'a-1|PENDING|N/A|Priority'; echo 'other|RUNNING|2026-11-30T05:00:00|None'")
        program(
            "sacct", "echo 'b-2|CANCELLED by 0|2026-11-30T05:00:00|None'; echo 'c-3|TIMEOUT|2026-11-30T04:00:00|None'"
        )
        if name != "other":
            (tmp_path / "jobs" / name).mkdir(parents=True)
    engine = engine_of(cluster)
    assert [(job.id, job.state, job.reason) for job in engine.list(cluster)] == [
        ("b-2", "STOPPED", ""), ("c-3", "FAILED", ""), ("a-1", "PENDING", "Priority")
    ]  # fmt: skip
    (tmp_path / "jobs" / "b-2" / "log").write_text("step 1\n")
    output = io.StringIO()
    engine.logs(cluster, "b-2", output)
    assert output.getvalue() == "step 1\n"
    with pytest.raises(JobError, match="there is no job 'nosuch' on it"):
        engine.status(cluster, "nosuch")


@pytest.mark.parametrize(
    ("status", "stopped", "state"), [("0", False, "SUCCEEDED"), ("1", False, "FAILED"), ("75", True, "STOPPED")]
)
def test_a_slurm_job_without_records_ended_as_its_script_says(
    tmp_path: Path, program: Program, status: str, stopped: bool, state: str
) -> None:
    program("sbatch", "echo 41")
    program("squeue", "")
    program("sacct", "exit 1")
    made = plan(tmp_path, "slurm")
    engine = engine_of(made.cluster)
    engine.submit(made, lambda _: None)
    folder = tmp_path / "jobs" / made.job
    (folder / "ended").write_text(f"{status}\n")
    if stopped:
        (folder / "stopped").touch()
    job = engine.status(made.cluster, made.job)
    assert (job.state, job.command, job.run) == (state, made.shown, made.run)


def test_a_stopped_slurm_job_does_not_queue_again(tmp_path: Path, program: Program) -> None:
    cluster = plan(tmp_path, "slurm").cluster
    (tmp_path / "jobs" / "a-1").mkdir(parents=True)
    program("squeue", f"[ -e {tmp_path}/ended ] || echo 'a-1|RUNNING|N/A|None'")
    program("sacct", "echo 'a-1|FAILED|N/A|None'")
    asked = program("scancel", f"touch {tmp_path}/ended")
    assert engine_of(cluster).stop(cluster, "a-1") == "a-1 stopped"
    assert asked() == "--batch --signal=TERM --name=a-1\n"
    assert (tmp_path / "jobs" / "a-1" / "stopped").exists()


def test_sky_gets_secrets_in_the_environment_only(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush-hush")
    script = f'for file in "$@"; do :; done; cp "$file" {tmp_path}/task.yaml; cp -r "$(dirname "$file")/code" {tmp_path}/sent; env >{tmp_path}/env'
    asked = program("sky", script)
    made = plan(tmp_path, "sky")
    engine_of(made.cluster).submit(made, print)
    assert "jobs launch --yes --detach-run --secret AWS_SECRET_ACCESS_KEY --secret RAY_AUTH_TOKEN" in asked()
    assert "hush" not in asked() + (tmp_path / "task.yaml").read_text()
    variables = (tmp_path / "env").read_text()
    assert "AWS_SECRET_ACCESS_KEY=hush-hush-hush\n" in variables
    assert "RAY_AUTH_TOKEN=" in variables
    assert sorted(path.name for path in (tmp_path / "sent").iterdir()) == ["jobs", "requirements.lock"]


def test_ray_up_starts_the_machines_and_submits_on_the_head(tmp_path: Path, program: Program) -> None:
    asked = program("ray", "")
    made = plan(tmp_path, "ray_up")
    engine_of(made.cluster).submit(made, print)
    started, submitted = asked().splitlines()
    assert started.startswith("up --yes --no-restart ")
    assert f"ray job submit --address http://127.0.0.1:8265 --no-wait --submission-id {made.job}" in submitted
    assert '"working_dir": "/tmp/detr-code"' in submitted


def test_a_head_that_cannot_start_jobs_yet_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_engine, "_AGAIN_S", 0.0)
    answers = iter([RuntimeError("status 500: No available agent to submit job"), "job-1"])
    lines: list[str] = []

    def submit() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    cluster: Any = SimpleNamespace(address="http://127.0.0.1:8265")
    assert ray_engine._accepted(cluster, submit, lines.append) == "job-1"
    assert lines == ["waiting for http://127.0.0.1:8265, which cannot start jobs yet"]

    def refuse() -> str:
        raise RuntimeError("status 400: no such field")

    with pytest.raises(JobError, match=r"refused the job .*no such field"):
        ray_engine._accepted(cluster, refuse, lines.append)
