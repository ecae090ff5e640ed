"""A real cluster of two nodes on this machine: submit, watch, stop, resume."""

import re
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.e2e_command import TINY, Command
from tests.ray_nodes import free_port, node, wait_for_nodes, wait_until_open

TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]


@pytest.fixture(scope="module")
def cluster(detr: Command) -> Iterator[str]:
    """Two nodes; yields the address for `--address`. Clients find token and job server through the environment."""
    port, dashboard = free_port(), free_port()
    (detr.folder / "token").write_text("a-token-of-this-test-alone-0123456789abcdef")
    detr.env |= {
        "RAY_AUTH_TOKEN_PATH": str(detr.folder / "token"),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    nodes = detr.env | {"RAY_AUTH_MODE": "token"}
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        head = ["--head", "--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1"]
        stack.enter_context(node(detr.folder, nodes, *head))
        wait_until_open(dashboard)
        stack.enter_context(node(detr.folder, nodes, "--address", address))
        wait_for_nodes(nodes | {"RAY_ADDRESS": address}, 2)
        yield address
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        detr.env.pop(name)


def test_a_job_is_submitted_stopped_and_resumed_as_one_run(detr: Command, cluster: str) -> None:
    output = detr("submit", "local", "--", *TRAIN, "--optim.epochs", "100", "--track.run-name", "submitted")
    (job,) = set(re.findall(r"detr-\d{8}-\d{6}-\w{4}", output))
    detr.wait_for_checkpoint("submitted", 30)
    assert detr("jobs", "status", job).strip() == "RUNNING"
    assert "train overfit" in detr("jobs", "list")
    follower = detr.start("jobs", "logs", job, "--follow")
    assert "stopped" in detr("jobs", "stop", job)
    followed, _ = follower.communicate(timeout=60)
    assert "detr resume" in followed
    assert detr.runs_named("submitted") == ["KILLED"]
    done = detr.points("submitted", "train/loss")[-1]
    assert 30 <= done < 600

    detr("resume", "submitted", "--address", cluster)
    assert detr.runs_named("submitted") == ["FINISHED"]
    steps = detr.points("submitted", "train/loss")
    assert steps == sorted(set(steps))
    assert steps[-1] == 600


def test_what_would_fail_on_the_cluster_is_refused_here(detr: Command) -> None:
    for words in (["train", "overfti"], ["train", "overfit", "--optim.lrr", "1"], ["trian"]):
        output = detr("submit", "local", "--", *words, status=1 if words == ["trian"] else 2)
        assert len(output.splitlines()) == 1
    output = detr("submit", "local", "--", "train", "overfit", "--data.train", "nowhere", status=1)
    assert "nowhere" in output


def test_a_cluster_that_is_not_there_is_one_clear_line(detr: Command) -> None:
    output = detr("jobs", "list", "--address", f"http://127.0.0.1:{free_port()}", status=1)
    assert len(output.splitlines()) == 1
    assert "ray start --head" in output


def test_shards_that_a_cluster_writes_are_the_same(cluster: str, detr: Command) -> None:
    coco = ["shard", "coco", "--images", "coco/train", "--annotations", "coco/annotations/instances_train.json"]
    coco += ["--samples-per-shard", "5"]
    detr(*coco, "--out", "data/here", "--workers", "0")
    detr(*coco, "--out", "data/cluster", "--address", cluster)
    here, there = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (detr.folder / "data/here", detr.folder / "data/cluster")
    )
    assert len(here) == 5 + 5
    assert here == there
