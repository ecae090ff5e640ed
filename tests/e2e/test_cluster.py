"""A real cluster of two nodes on this machine, with shards and checkpoints on an S3 server: submit, watch, stop, resume."""

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import TINY, Command
from tests.support.ray_nodes import free_port, node, wait_until_open
from tests.support.recording import Recording
from tests.support.s3_server import SECRET, S3Server

EPOCHS, STEPS = 10, 60


@dataclass(frozen=True)
class Cluster:
    """Two Ray nodes: their address for `--address`, the pace of workers that train on them, and the store that they know."""

    address: str
    recording: Recording
    store: S3Server


@pytest.fixture(scope="module")
def cluster(detr: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Nodes and clients find the token, the job server and the S3 server through the environment."""
    port, dashboard = free_port(), free_port()
    recording = Recording(tmp_path_factory.mktemp("cluster") / "steps")
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text("a-token-of-this-test-alone-0123456789abcdef")
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        store = S3Server(tmp_path_factory.mktemp("s3"), written=True)
        stack.callback(store.stop)
        detr.env |= store.environment | {
            "DETR_CACHE": str(tmp_path_factory.mktemp("kept")),
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        }
        recording.pace(0.1)
        nodes = detr.env | recording.environment | {"RAY_AUTH_MODE": "token"}
        head = ["--head", "--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1"]
        stack.enter_context(node(detr.folder, nodes, *head))
        wait_until_open(dashboard)
        stack.enter_context(node(detr.folder, nodes, "--address", address))
        yield Cluster(address, recording, store)


@dataclass(frozen=True)
class Submitted:
    """A run of two workers that was submitted as a job, stopped, and resumed from this machine.

    stopped_at: the last step that it reported before it was stopped. output: of `detr resume`.
    """

    run: str
    stopped_at: int
    output: str


@pytest.fixture(scope="module")
def submitted(detr: Command, cluster: Cluster) -> Submitted:
    train, val = (cluster.store.put(detr.folder / "data" / split, split) for split in ("train", "val"))
    store = ["--checkpoint.store", "s3://sets/runs"]
    words = ["train", "overfit", "--data.train", train, "--data.val", val, *store, *TINY, "--optim.epochs", str(EPOCHS)]
    output = detr("submit", "local", "--", *words, "--track.run-name", "submitted")
    (job,) = re.findall(r"^submitted +(\S+) to local", output, re.MULTILINE)
    (run,) = re.findall(r"^run +(submitted-\w+)$", output, re.MULTILINE)
    detr.wait_for_checkpoint("submitted", 10, cluster.store.root / "sets" / "runs")
    cluster.recording.pace(2)  # so that the job is not done before it is stopped
    status = detr("jobs", "status", job)
    assert status.splitlines()[0] == "RUNNING"
    assert f"{run} (" in status
    assert "train overfit" in detr("jobs", "list")
    follower = detr.start("jobs", "logs", job, "--follow")
    assert "stopped" in detr("jobs", "stop", job)
    followed, _ = follower.communicate(timeout=600)
    assert "detr resume" in followed
    assert detr.runs_named(run) == ["KILLED"]
    assert detr.tag(run, "detr.job") == job
    (kept,) = detr.folder.glob(f"mlartifacts/**/logs/{job}.log")
    assert "detr resume" in kept.read_text()
    stopped_at = detr.points(run, "train/loss")[-1]
    cluster.recording.pace(0)
    return Submitted(run, stopped_at, detr("resume", run, "--address", cluster.address))


def test_submitted_job_is_stopped_and_resumed_as_one_run(detr: Command, submitted: Submitted) -> None:
    assert 10 <= submitted.stopped_at < STEPS
    assert detr.runs_named(submitted.run) == ["FINISHED"]
    steps = detr.points(submitted.run, "train/loss")
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    assert len(detr.points(submitted.run, "val/AP")) == 1


def test_cluster_fetches_each_shard_once_from_s3(cluster: Cluster, submitted: Submitted) -> None:
    shards = Counter(cluster.store.gets(".tar"))
    assert {name.split("/")[0] for name in shards} == {"train", "val"}
    assert set(shards.values()) == {1}
    assert Counter(cluster.store.gets(".npy")).most_common(1)[0][1] == 1


def test_checkpoints_are_on_s3_alone_and_secrets_nowhere(detr: Command, cluster: Cluster, submitted: Submitted) -> None:
    stored = [path for path in (cluster.store.root / "sets" / "runs").rglob("*") if path.is_file()]
    names = {path.name for path in stored}
    of_checkpoint = {"meta.json", "evaluation.json", "detections.safetensors", ".metadata", "__0_0.distcp"}
    assert names - {"__1_0.distcp"} == of_checkpoint | {"evaluations.json"}
    assert not list(detr.folder.glob("runs/submitted-*/checkpoints"))
    assert "best        s3://sets/runs/submitted-" in submitted.output
    assert not [path for path in stored if SECRET.encode() in path.read_bytes()]
    files = [path for path in detr.folder.rglob("*") if path.is_file()]
    assert any(path.name == "mlflow.db" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in submitted.output


def test_changed_image_bytes_end_the_run_with_the_name_of_the_image(detr: Command, cluster: Cluster) -> None:
    shutil.copytree(detr.folder / "data/train", detr.folder / "changed")
    shard = detr.folder / "changed/shard-000000.tar"
    content = bytearray(shard.read_bytes())
    start = content.index(b"\xff\xd8\xff") + 200
    content[start : start + 8] = bytes(byte ^ 0x55 for byte in content[start : start + 8])
    shard.write_bytes(content)
    words = ["train", "overfit", "--data.train", "changed", "--data.val", "data/val", *TINY, "--optim.epochs", "3"]
    output = detr(*words, "--track.run-name", "changed", "--address", cluster.address, status=1)
    assert "bytes changed" in output.splitlines()[-1]
    assert "Traceback" not in output
    assert detr.runs_named("changed") == ["FAILED"]


def test_shards_written_by_a_cluster_are_those_of_one_machine(detr: Command, cluster: Cluster) -> None:
    coco = ["shard", "coco", "--images", "coco/train", "--annotations", "coco/annotations/instances_train.json"]
    detr(*coco, "--samples-per-shard", "5", "--out", "data/cluster", "--address", cluster.address)
    local, remote = (files(detr.folder / folder) for folder in ("data/train", "data/cluster"))
    assert len(local) == 5 + 5
    assert local == remote


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
