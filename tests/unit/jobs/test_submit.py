"""Submitting to Ray: what is checked first, and what the job server gets."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.clusters import Ray, find_cluster
from jobs.commands import cluster
from jobs.engines import ray as module
from jobs.engines.engine import Job
from jobs.engines.ray import RayEngine
from jobs.errors import JobError
from jobs.submit import submit
from pipeline.errors import PipelineError
from pipeline.tracking.server import address
from shards.errors import ShardError


class Server:
    """Job server that records the request of a submitted job."""

    def __init__(self) -> None:
        self.request: dict[str, Any] = {}
        self.uploaded: list[str] = []

    def submit_job(self, **request: Any) -> str:
        self.request = request
        folder = request["runtime_env"].get("working_dir")
        if folder:
            self.uploaded = [str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()]
        return str(request["submission_id"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(module, "connect", lambda cluster: made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    return made


def submit_here(*command: str) -> None:
    """Run `detr submit local -- COMMAND`."""
    cluster.submit(["local", "--", *command])


def test_job_runs_the_same_command_in_the_folder_of_the_entry(server: Server) -> None:
    here = Ray(
        name="here",
        address="http://127.0.0.1:8265",
        code="installed",
        python="/opt/py thon",
        directory="/data/my run",
        environment={"NCCL_DEBUG": "WARN"},
        cache="/local",
    )
    job_id = submit(here, ["shard", "info", "it's mine"])
    assert server.request["submission_id"] == job_id
    assert server.request["entrypoint"] == (
        "cd '/data/my run' && exec '/opt/py thon' -P -m jobs.cli shard info 'it'\"'\"'s mine'"
    )
    variables = server.request["runtime_env"]["env_vars"]
    assert variables["MLFLOW_TRACKING_URI"] == "http://tracking:5000"
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGTERM"
    assert (variables["NCCL_DEBUG"], variables["DETR_CACHE"], variables["DETR_JOB"]) == ("WARN", "/local", job_id)
    assert "working_dir" not in server.request["runtime_env"]


def test_a_snapshot_travels_with_its_commit(server: Server) -> None:
    lines: list[str] = []
    lab = Ray(name="lab", address="http://127.0.0.1:8265", requirements="lock", driver_labels={"kind": "stays"})
    submit(lab, ["train", "demo"], lines.append)
    assert {"jobs/cli.py", "detr/model.py", "requirements.lock"} <= set(server.uploaded)
    variables = server.request["runtime_env"]["env_vars"]
    assert len(variables["DETR_COMMIT"].removesuffix("-dirty")) == 40
    assert server.request["metadata"]["commit"] == variables["DETR_COMMIT"]
    assert any(line.startswith("torch==") for line in server.request["runtime_env"]["pip"]["packages"])
    assert server.request["entrypoint_label_selector"] == {"kind": "stays"}
    assert any("MB, commit " in line for line in lines)


def test_every_retry_of_a_submitted_training_is_the_same_run(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_here("train", "demo", "--track.run-name", "mine")
    command = server.request["metadata"]["command"]
    assert command.startswith("detr train demo --run mine-")
    assert "--track.run-name" not in command
    assert server.request["metadata"]["run"] == command.split()[-1]
    submit_here("train", "demo", "--run", "ours")
    assert server.request["metadata"]["command"] == "detr train demo --run ours"
    assert server.request["submission_id"].startswith("ours-")
    assert "run         ours\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "uri",
    [
        "http://ada:hunter2@tracking:5000",
        "postgresql://ada:hunter2@db/mlflow",
        "postgresql://ada:a/hunter2@db/mlflow",
        "postgresql://db/mlflow?user=ada&password=hunter2",
    ],
)
def test_password_in_the_tracking_uri_is_not_sent(server: Server, monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # a login in the address moves there
    monkeypatch.setattr(address._Moved, "login", False)
    with pytest.raises(PipelineError, match="MLFLOW_TRACKING_URI holds a user name or password") as caught:
        submit(find_cluster("local"), ["train", "demo"])
    assert "hunter2" not in str(caught.value)
    assert server.request == {}


def test_command_that_would_fail_on_the_cluster_is_not_sent(server: Server, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="did you mean train"):
        submit_here("tarin", "demo")
    with pytest.raises(ShardError, match=r"no manifest\.json here"):
        submit_here("train", "detr-r50", "--data.train", str(tmp_path))
    with pytest.raises(PipelineError, match="finetune needs --initial"):
        submit_here("train", "finetune")
    with pytest.raises(PipelineError, match=r"optim\.epochs is 0"):
        submit_here("train", "demo", "--optim.epochs", "0")
    with pytest.raises(JobError, match="needs no cluster"):
        submit_here("train", "--help")
    assert server.request == {}


def test_local_is_this_interpreter_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    local = find_cluster("local")
    assert isinstance(local, Ray)
    assert (local.python, local.directory, local.address) == (sys.executable, str(tmp_path), "http://head:8265")


def test_command_with_truncated_data_is_not_sent(server: Server, tiny_data: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_data.train, tmp_path / "train")
    shard = next((tmp_path / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ShardError, match="truncated"):
        submit_here("train", "overfit", "--data.train", str(tmp_path / "train"), "--data.val", tiny_data.val)
    assert server.request == {}


@pytest.mark.parametrize("flags", [["--out", "s3://ada:hunter2@sets/x"], ["--out=s3://ada:hunter2@sets/x"]])
def test_password_in_a_flag_is_not_sent(server: Server, flags: list[str]) -> None:
    with pytest.raises(ShardError, match="holds a password") as caught:
        submit_here("shard", "coco", *flags)
    assert "hunter2" not in str(caught.value)
    assert not server.request


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


def test_a_command_is_checked_and_sent_without_torch(tiny_data: Any) -> None:
    code = (
        "import sys; from jobs.clusters import find_cluster; from jobs.submit import prepare; import ray.job_submission;"
        "import jobs.engines.ray; prepare(find_cluster('local'), sys.argv[1:]);"
        "print(*sorted({'torch', 'torchvision', 'mlflow', 'pandas'} & sys.modules.keys()))"
    )
    command = ["train", "overfit", "--data.train", tiny_data.train, "--data.val", tiny_data.val]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
