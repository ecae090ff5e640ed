"""A real cluster of two nodes on this machine: submit, watch, stop, resume."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e_command import TINY, Command
from tests.ray_nodes import free_port, node, wait_for_nodes, wait_until_open
from tests.recording import Recording

pytestmark = pytest.mark.xdist_group("ray")
TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]
EPOCHS, STEPS = 20, 120


@dataclass(frozen=True)
class Cluster:
    """Two Ray nodes: their address for `--address`, and the pace of workers that train on them."""

    address: str
    recording: Recording


@pytest.fixture(scope="module")
def cluster(detr: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Clients find token and job server through the environment."""
    port, dashboard = free_port(), free_port()
    recording = Recording(tmp_path_factory.mktemp("cluster") / "steps")
    (detr.folder / "token").write_text("a-token-of-this-test-alone-0123456789abcdef")
    detr.env |= {
        "RAY_AUTH_TOKEN_PATH": str(detr.folder / "token"),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    nodes = detr.env | recording.environment | {"RAY_AUTH_MODE": "token"}
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        head = ["--head", "--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1"]
        stack.enter_context(node(detr.folder, nodes, *head))
        wait_until_open(dashboard)
        stack.enter_context(node(detr.folder, nodes, "--address", address))
        wait_for_nodes(nodes | {"RAY_ADDRESS": address}, 2)
        yield Cluster(address, recording)
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        detr.env.pop(name)


def test_submitted_job_is_stopped_and_resumed_as_one_run(detr: Command, cluster: Cluster) -> None:
    output = detr("submit", "local", "--", *TRAIN, "--optim.epochs", str(EPOCHS), "--track.run-name", "submitted")
    (job,) = set(re.findall(r"detr-\d{8}-\d{6}-\w{4}", output))
    detr.wait_for_checkpoint("submitted", 20)
    cluster.recording.pace(1)  # so that the job is not done before it is stopped
    assert detr("jobs", "status", job).strip() == "RUNNING"
    assert "train overfit" in detr("jobs", "list")
    follower = detr.start("jobs", "logs", job, "--follow")
    assert "stopped" in detr("jobs", "stop", job)
    followed, _ = follower.communicate(timeout=60)
    assert "detr resume" in followed
    assert detr.runs_named("submitted") == ["KILLED"]
    done = detr.points("submitted", "train/loss")[-1]
    assert 20 <= done < STEPS

    cluster.recording.pace(0)
    detr("resume", "submitted", "--address", cluster.address)
    assert detr.runs_named("submitted") == ["FINISHED"]
    steps = detr.points("submitted", "train/loss")
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS


def test_shards_written_by_a_cluster_are_those_of_one_machine(detr: Command, cluster: Cluster) -> None:
    coco = ["shard", "coco", "--images", "coco/train", "--annotations", "coco/annotations/instances_train.json"]
    detr(*coco, "--samples-per-shard", "5", "--out", "data/cluster", "--address", cluster.address)
    local, remote = (content(detr.folder / folder) for folder in ("data/train", "data/cluster"))
    assert len(local) == 5 + 5
    assert local == remote


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
