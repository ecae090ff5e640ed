"""Submitting to Ray: what the job server gets."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from secrets import token_hex
from threading import Thread
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from jobs.clusters import Ray, find_cluster
from jobs.code import Code
from jobs.engines import ray as module
from jobs.engines.engine import Job
from jobs.engines.ray import RayEngine
from jobs.plan import Request, make_plan
from jobs.submit import submit
from tests.support.in_process import ROOT, Detr
from tests.support.job_server import JobServer, job_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[JobServer]:
    """The Ray cluster `local`, which is MLflow's server, too."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # what the command sets is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with job_server() as made:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", made.url)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", made.url)
        yield made


def test_job_runs_the_same_command_in_the_folder_of_the_entry(server: JobServer, tmp_path: Path) -> None:
    (tmp_path / "my run").mkdir()
    here = Ray(
        name="here",
        address=server.url,
        code="installed",
        python="/opt/py thon",
        directory=str(tmp_path / "my run"),
        mlflow="https://tracking",
        environment={"NCCL_DEBUG": "WARN"},
        cache="/local",
        on_cluster=("/opt", "https://tracking", "it's mine"),
    )
    job_id = submit(here, ["shard", "info", "it's mine"])
    assert server.job["submission_id"] == job_id
    words = "'/opt/py thon' -P -m jobs.cli shard info 'it'\"'\"'s mine'"
    lines = server.job["entrypoint"].split("; ")
    assert lines[0].startswith(f"cd '{tmp_path}/my run' 2>/dev/null || {{ echo ")
    assert server.job["entrypoint"].endswith(f"; exec {words}")
    variables = server.job["runtime_env"]["env_vars"]
    assert variables["MLFLOW_TRACKING_URI"] == "https://tracking"
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGTERM"
    assert (variables["NCCL_DEBUG"], variables["DETR_CACHE"], variables["DETR_JOB"]) == ("WARN", "/local", job_id)
    assert "working_dir" not in server.job["runtime_env"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"directory": "/no/su'ch"},
            "detr: there is no folder /no/su'ch here; expected the directory of the entry lab\n",
        ),
        ({"python": "/no/python"}, "detr: there is no /no/python here; expected the python of the entry lab\n"),
    ],
)
def test_what_is_missing_where_the_job_starts_is_a_line(changes: dict[str, Any], line: str) -> None:
    lab = Ray(name="lab", address="http://head:8265", **changes)
    plan = make_plan(lab, Request(("demo",)), Code.installed(), "12ab34cd", "")
    done = subprocess.run(["sh", "-c", plan.shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, line)


def test_a_snapshot_of_the_tracked_files_travels_with_its_commit(server: JobServer, tmp_path: Path) -> None:
    lines: list[str] = []
    lab = Ray(
        name="lab",
        address=server.url,
        requirements="lock",
        driver_labels={"kind": "stays"},
        storage=str(tmp_path),
        on_cluster=(server.url,),
    )
    submit(lab, ["train", "demo"], lines.append)
    (package,) = [body for body in server.bodies if body.startswith(b"PK")]
    names = set(zipfile.ZipFile(io.BytesIO(package)).namelist())
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    assert {name for name in names if not name.endswith("/")} <= set(tracked.stdout.splitlines())
    assert {"jobs/cli.py", "detr/model.py", "requirements.lock"} <= names
    variables = server.job["runtime_env"]["env_vars"]
    assert len(variables["DETR_COMMIT"].removesuffix("-dirty")) == 40
    assert server.job["metadata"]["commit"] == variables["DETR_COMMIT"]
    assert any(line.startswith("torch==") for line in server.job["runtime_env"]["pip"]["packages"])
    assert server.job["runtime_env"]["config"]["setup_timeout_seconds"] == 3600
    assert server.job["entrypoint_label_selector"] == {"kind": "stays"}
    assert any(f"commit {variables['DETR_COMMIT']}" in line for line in lines)


def test_every_retry_of_a_submitted_training_is_the_same_run(detr: Detr, server: JobServer) -> None:
    submitted = detr("submit", "local", "--", "train", "demo", "--track.run-name", "mine")
    assert submitted.status == 0
    command = server.job["metadata"]["command"]
    assert command.startswith("detr train demo --run mine-")
    assert "--track.run-name" not in command
    assert server.job["metadata"]["run"] == command.split()[-1]
    submitted = detr("submit", "local", "--", "train", "demo", "--run", "ours")
    assert server.job["metadata"]["command"] == "detr train demo --run ours"
    assert server.job["submission_id"].startswith("ours-")
    assert "run         ours\n" in submitted.out
    assert f"detr jobs stop {server.job['submission_id']}" in submitted.out


def test_dry_run_and_write_send_nothing(detr: Detr, server: JobServer, tmp_path: Path) -> None:
    written = detr("submit", "local", "--write", "job.json", "--", "shard", "info", ".")
    assert (written.status, written.err) == (0, "")
    assert json.loads((tmp_path / "job.json").read_text())["entrypoint"].endswith("-m jobs.cli shard info .")
    dry = detr("submit", "local", "--dry-run", "--", "shard", "info", ".")
    assert "command      detr shard info .\n" in dry.out
    assert {request.split("?")[0] for request in server.requests} <= {"GET /health"}


def test_the_token_of_an_entry_goes_to_its_address_and_no_other_does(
    server: JobServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a-token-of-this-machine")
    monkeypatch.setenv("LAB_TOKEN", "a-token-of-the-lab")
    lab = Ray(name="lab", address=server.url, storage=str(tmp_path), on_cluster=(server.url,))
    submit(lab, ["train", "demo"], print)
    assert server.tokens == {""}
    server.token = "a-token-of-the-lab"
    submit(msgspec.structs.replace(lab, token="env:LAB_TOKEN"), ["train", "demo"], print)
    assert server.tokens == {"", "Bearer a-token-of-the-lab"}


def test_the_token_of_this_machine_stays_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token-of-this-machine")
    for address, token in (("http://127.0.0.1:8265", "Bearer a-token-of-this-machine"), ("http://head:8265", "")):
        assert module._headers(Ray(name="local", address=address))["Authorization"] == token


def test_a_token_does_not_follow_to_another_server(server: JobServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_TOKEN", "a-token-of-the-lab")

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("location", server.url + self.path)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as first:
        Thread(target=first.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        lab = Ray(name="lab", address=f"http://127.0.0.1:{first.server_port}", token="env:LAB_TOKEN")
        module._ask(lab, "/api/version")
        first.shutdown()
    assert server.tokens == {""}


def test_planted_secrets_are_in_nothing_that_is_sent_or_printed(
    detr: Detr, server: JobServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    planted = {name: token_hex(16) for name in ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD")}
    server.token = token_hex(16)
    (tmp_path / "token").write_text(server.token)
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "detr.toml").write_text(f"""
        [clusters.lab]
        launcher = "ray"
        address = "{server.url}"
        token = "file:{tmp_path}/token"
        storage = "{tmp_path}/runs"
        secrets = {{AWS_SECRET_ACCESS_KEY = "env:AWS_SECRET_ACCESS_KEY"}}
        on_cluster = ["{server.url}"]
        """)
    submitted = detr("submit", "lab", "--", "train", "demo")
    assert submitted.status == 0, submitted.err
    assert "AWS_SECRET_ACCESS_KEY:?" in server.job["entrypoint"]
    refused = detr("submit", "lab", "--", "train", "demo", "--run", planted["MLFLOW_TRACKING_PASSWORD"])
    assert "the command holds the value of MLFLOW_TRACKING_PASSWORD" in refused.line
    everything = server.sent() + "".join([submitted.out, submitted.err, refused.out, refused.err]).encode()
    assert not [value for value in (*planted.values(), server.token) if value.encode() in everything]


@pytest.mark.parametrize(
    ("grace_s", "said"), [(60, "detr-1 stopped"), (0, "detr-1 killed: it did not stop within 0 s")]
)
def test_a_job_that_did_not_stop_in_time_is_called_killed(
    monkeypatch: pytest.MonkeyPatch, grace_s: int, said: str
) -> None:
    states = iter([Job("detr-1", "RUNNING"), Job("detr-1", "STOPPED")])
    monkeypatch.setattr(RayEngine, "status", lambda *_: next(states))
    monkeypatch.setattr(module, "connect", lambda _: SimpleNamespace(stop_job=lambda _: None))
    monkeypatch.setattr(module, "GRACE_S", grace_s)
    local = find_cluster("local")
    assert isinstance(local, Ray)
    assert RayEngine().stop(local, "detr-1") == said


def test_a_command_is_checked_and_sent_without_torch_in_seconds_of_a_core(server: JobServer, tiny_data: Any) -> None:
    code = (
        "import sys; from jobs.cli import run; status = run(sys.argv[1:]);"
        "heavy = {'torch', 'torchvision', 'mlflow', 'pandas'} & sys.modules.keys();"
        "import time; print(status, *heavy, time.process_time(), file=sys.stderr)"
    )
    data = ["--data.train", tiny_data.train, "--data.val", tiny_data.val]
    words = ["submit", "local", "--", "train", "overfit", *data]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, env=environment)
    status, *heavy, seconds = done.stderr.split()
    assert (status, heavy) == ("0", []), done.stderr
    print(f"{seconds} CPU s")
    assert server.job["metadata"]["command"].startswith("detr train overfit")
