import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs import submit as module
from jobs.cli import check
from jobs.commands import cluster
from jobs.spec import Spec
from jobs.submit import JobError, spec_named, stop, submit
from pipeline.errors import PipelineError
from shards.errors import ShardError


class Server:
    """Job server that records the request of a submitted job."""

    def __init__(self) -> None:
        self.request: dict[str, Any] = {}

    def submit_job(self, **request: Any) -> str:
        self.request = request
        return str(request["submission_id"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(module, "connect", lambda spec: made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    return made


def submit_here(*command: str) -> None:
    """Run `detr submit local -- COMMAND`."""
    cluster.submit(["local", "--", *command], check)


def test_job_runs_the_same_command_in_the_folder_of_the_spec(server: Server) -> None:
    spec = Spec("here", "http://127.0.0.1:8265", python="/opt/py thon", directory="/data/my run")
    job_id = submit(spec, ["train", "demo", "--track.run-name", "it's mine"])
    assert job_id.startswith("detr-")
    assert server.request["entrypoint"] == (
        "cd '/data/my run' && exec '/opt/py thon' -m jobs.cli train demo --track.run-name 'it'\"'\"'s mine'"
    )
    variables = server.request["runtime_env"]["env_vars"]
    assert variables["MLFLOW_TRACKING_URI"] == "http://tracking:5000"
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGTERM"


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
    with pytest.raises(PipelineError, match="MLFLOW_TRACKING_URI holds a user name or password") as caught:
        submit(spec_named("local"), ["train", "demo"])
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


def test_commands_other_than_train_are_sent_unchecked(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    submit_here("resume", "anything")
    assert server.request["entrypoint"].endswith("-m jobs.cli resume anything")
    assert f"detr jobs stop {server.request['submission_id']}" in capsys.readouterr().out


def test_local_spec_is_this_interpreter_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    spec = spec_named("local")
    assert (spec.python, spec.directory, spec.address) == (sys.executable, str(tmp_path), "http://head:8265")
    assert spec_named("local", "http://other:1").address == "http://other:1"


def test_unknown_spec_error_lists_the_known_ones() -> None:
    with pytest.raises(JobError, match="there is no spec 'k8s'; expected one of: local"):
        spec_named("k8s")


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


def test_a_command_is_checked_and_sent_without_torch(tiny_data: Any) -> None:
    code = (
        "import sys; from jobs.cli import check; import jobs.submit; import ray.job_submission; check(sys.argv[1:]);"
        "print(*sorted({'torch', 'torchvision', 'mlflow', 'pandas'} & sys.modules.keys()))"
    )
    command = ["train", "overfit", "--data.train", tiny_data.train, "--data.val", tiny_data.val]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("grace_s", "said"), [(60, "detr-1 stopped"), (0, "detr-1 killed: it did not stop within 0 s")]
)
def test_a_job_that_did_not_stop_in_time_is_called_killed(
    monkeypatch: pytest.MonkeyPatch, grace_s: int, said: str
) -> None:
    states = iter(["RUNNING", "STOPPED"])
    monkeypatch.setattr("jobs.submit.status", lambda *_: next(states))
    monkeypatch.setattr("jobs.submit.connect", lambda _: SimpleNamespace(stop_job=lambda _: None))
    monkeypatch.setattr("jobs.submit._GRACE_S", grace_s)
    assert stop(spec_named("local"), "detr-1") == said
