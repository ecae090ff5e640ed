import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs import submit as module
from jobs.spec import Spec
from jobs.submit import JobError, check, spec_named, submit
from pipeline.errors import PipelineError
from shards.errors import ShardError


class Server:
    """Takes a job and remembers how it was asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def submit_job(self, **asked: Any) -> str:
        self.asked = asked
        return str(asked["submission_id"])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(module, "connect", lambda spec: made)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    return made


def test_the_job_is_the_same_command_in_the_spec_s_folder(server: Server) -> None:
    spec = Spec("here", "http://127.0.0.1:8265", python="/opt/py thon", directory="/data/my run")
    job_id = submit(spec, ["train", "demo", "--track.run-name", "it's mine"])
    assert job_id.startswith("detr-")
    assert server.asked["entrypoint"] == (
        "cd '/data/my run' && exec '/opt/py thon' -m jobs.cli train demo --track.run-name 'it'\"'\"'s mine'"
    )
    variables = server.asked["runtime_env"]["env_vars"]
    assert variables["MLFLOW_TRACKING_URI"] == "http://tracking:5000"
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


@pytest.mark.parametrize(
    "uri",
    [
        "http://ada:hunter2@tracking:5000",
        "postgresql://ada:hunter2@db/mlflow",
        "postgresql://ada:a/hunter2@db/mlflow",
        "postgresql://db/mlflow?user=ada&password=hunter2",
    ],
)
def test_a_password_is_never_sent_where_others_can_read_it(
    server: Server, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(PipelineError, match="MLFLOW_TRACKING_URI holds a user name or password") as caught:
        submit(spec_named("local"), ["train", "demo"])
    assert "hunter2" not in str(caught.value)
    assert server.asked == {}


def test_what_would_fail_there_is_refused_here(server: Server, tmp_path: Path) -> None:
    spec = spec_named("local")
    with pytest.raises(JobError, match="did you mean train"):
        submit(spec, ["tarin", "demo"])
    with pytest.raises(ShardError, match=r"no manifest\.json here"):
        submit(spec, ["train", "detr-r50", "--data.train", str(tmp_path)])
    with pytest.raises(PipelineError, match="finetune needs --initial"):
        submit(spec, ["train", "finetune"])
    with pytest.raises(PipelineError, match=r"optim\.epochs is 0"):
        submit(spec, ["train", "demo", "--optim.epochs", "0"])
    with pytest.raises(JobError, match="needs no cluster"):
        submit(spec, ["train", "--help"])
    assert server.asked == {}


def test_commands_other_than_train_are_sent_as_they_are() -> None:
    check(["resume", "anything"])


def test_the_local_spec_is_this_interpreter_and_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    spec = spec_named("local")
    assert (spec.python, spec.directory, spec.address) == (sys.executable, str(tmp_path), "http://head:8265")
    assert spec_named("local", "http://other:1").address == "http://other:1"


def test_an_unknown_spec_names_those_there_are() -> None:
    with pytest.raises(JobError, match="there is no spec 'k8s'; expected one of: local"):
        spec_named("k8s")


def test_truncated_data_is_refused_here(server: Server, tiny_data: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_data.train, tmp_path / "train")
    shard = next((tmp_path / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ShardError, match="truncated"):
        submit(
            spec_named("local"),
            ["train", "overfit", "--data.train", str(tmp_path / "train"), "--data.val", tiny_data.val],
        )
    assert server.asked == {}


@pytest.mark.parametrize("words", [["--out", "s3://ada:hunter2@sets/x"], ["--out=s3://ada:hunter2@sets/x"]])
def test_a_secret_in_an_address_is_never_sent_either(server: Server, words: list[str]) -> None:
    with pytest.raises(ShardError, match="holds a password") as caught:
        submit(spec_named("local"), ["shard", "coco", *words])
    assert "hunter2" not in str(caught.value)
    assert not server.asked
