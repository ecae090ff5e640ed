"""A real cluster of two nodes on this machine: submit, watch, stop, resume."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.e2e_command import TINY, Command

TRAIN = ["train", "overfit", "--data.train", "data/train", "--data.val", "data/val", *TINY]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _node(folder: Path, environment: dict[str, str], *flags: str) -> Iterator[None]:
    """A Ray node of one CPU; ended, with all that it started, when the block is left."""
    ray = Path(sys.executable).with_name("ray")
    command = [str(ray), "start", *flags, "--num-cpus", "1", "--disable-usage-stats", "--block"]
    with (folder / "ray.log").open("a") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        yield
    finally:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for child in below:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(below, timeout=20)


@pytest.fixture(scope="module")
def cluster(detr: Command) -> Iterator[str]:
    """Two nodes; yields the address for `--address`. Clients find token and job server through the environment."""
    port, dashboard = _free_port(), _free_port()
    (detr.folder / "token").write_text("a-token-of-this-test-alone-0123456789abcdef")
    detr.env |= {
        "RAY_AUTH_TOKEN_PATH": str(detr.folder / "token"),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    nodes = detr.env | {"RAY_AUTH_MODE": "token"}
    address = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        head = ["--head", "--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-host", "127.0.0.1"]
        stack.enter_context(_node(detr.folder, nodes, *head))
        _wait_until_open(dashboard)
        stack.enter_context(_node(detr.folder, nodes, "--address", address))
        _wait_for_nodes(nodes | {"RAY_ADDRESS": address}, 2)
        yield address
    for name in ("RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS"):
        detr.env.pop(name)


def _wait_until_open(port: int, timeout_s: float = 90) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise AssertionError("Ray's dashboard did not open")


def _wait_for_nodes(environment: dict[str, str], count: int, timeout_s: float = 90) -> None:
    code = "import ray; ray.init(logging_level='ERROR'); print(sum(node['Alive'] for node in ray.nodes()))"
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        if answer.stdout.split()[-1:] == [str(count)]:
            return
        time.sleep(1)
    raise AssertionError(f"the cluster did not reach {count} nodes: {answer.stderr[-500:]}")


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
    output = detr("jobs", "list", "--address", f"http://127.0.0.1:{_free_port()}", status=1)
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
