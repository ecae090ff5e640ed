"""Hosts that share nothing but an S3 server and MLflow: what cannot run is refused, and what is lost is continued elsewhere.

The name of each host resolves to a loopback address, as on Debian.
"""

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.command import TINY, Command
from tests.support.hosts import Host, Network, network, reason_without_hosts
from tests.support.ray_nodes import free_port, start_command
from tests.support.recording import RECORDER
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
DETR = (sys.executable, "-m", "jobs.cli")
STEPS = 60
TRAIN = ["train", "overfit", *TINY, "--optim.epochs", "10", "--checkpoint.every-steps", "5", "--evaluate.every", "5"]


@dataclass
class Site:
    """A network, the servers that its hosts share, and their environment."""

    network: Network
    store: S3Server
    database: Path
    environment: dict[str, str]
    folder: Path

    def host(self, name: str) -> Host:
        return self.network.add(name, self.folder / name, self.environment)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with sqlite3.connect(self.database) as database:
            return database.execute(query).fetchall()

    def saved(self, run: str) -> int:
        """The newest step that the store has of a run."""
        found = (self.store.root / "sets" / "runs" / run / "checkpoints").glob("step-*/meta.json")
        return max((int(path.parent.name.split("-")[1]) for path in found), default=0)


@pytest.fixture(scope="module")
def site(detr: Command, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if reason := reason_without_hosts():
        pytest.skip(reason)
    with ExitStack() as stack:
        net = stack.enter_context(network())
        store = S3Server(tmp_path_factory.mktemp("s3"), written=True, host=net.gateway)
        stack.callback(store.stop)
        for split in ("train", "val"):
            store.put(detr.folder / "data" / split, split)
        port, database = free_port(), detr.folder / "mlflow.db"
        stack.callback(_end, _mlflow(net.gateway, port, database, detr))
        kept = ("PATH", "LANG", "OMP_NUM_THREADS", "MLFLOW_DISABLE_TELEMETRY")
        environment = {name: os.environ[name] for name in kept if name in os.environ} | store.environment
        environment |= {
            "MLFLOW_TRACKING_URI": f"http://{net.gateway}:{port}",
            "PYTHONPATH": f"{RECORDER}:{ROOT}",
            "DETR_RECORD": "/mnt",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "a-token-of-this-test-alone-0123456789abcdef",
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            "RAY_prestart_worker_first_driver": "0",
            # A node that does not answer is lost after 15 s instead of 50.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
        }
        yield Site(net, store, database, environment, tmp_path_factory.mktemp("hosts"))


def _mlflow(host: str, port: int, database: Path, detr: Command) -> subprocess.Popen[bytes]:
    words = ["--workers", "1", "--host", host, "--port", str(port), "--backend-store-uri", f"sqlite:///{database}"]
    words += ["--artifacts-destination", str(detr.folder / "artifacts"), "--allowed-hosts", f"{host},{host}:{port}"]
    environment = detr.env | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, 9)
    server.wait()


def start_ray(host: Host, *flags: str, cpus: int = 1) -> None:
    """Start a Ray node on the host."""
    host.start("ray.log", *start_command("ray.log", "--node-ip-address", host.address, *flags, cpus=cpus))


def start_head(host: Host, *flags: str, cpus: int = 1) -> str:
    """Start the first node of a cluster on the host; return its address."""
    start_ray(host, "--head", "--port", "6379", "--include-dashboard", "false", *flags, cpus=cpus)
    wait_for_ray(host)
    return f"{host.address}:6379"


def wait_for_ray(host: Host) -> None:
    until(lambda: "Ray runtime started" in host.log("ray.log"), f"Ray on {host.name}", 240)


def until(condition: Any, what: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def train(address: str, run: str, *flags: str, storage: str = "s3://sets/runs") -> list[str]:
    data = ["--data.train", "s3://sets/train", "--data.val", "s3://sets/val", "--storage", storage]
    return [*DETR, *TRAIN, *data, "--address", address, "--run", run, *flags]


def pace(host: Host, seconds: float) -> None:
    (host.folder / "pace.aside").write_text(str(seconds))
    (host.folder / "pace.aside").rename(host.folder / "pace")


def test_a_cluster_that_cannot_train_is_refused_in_a_line_before_a_run_exists(site: Site) -> None:
    first, second = site.host("host-a"), site.host("host-b")
    address = start_head(first)

    # The code of the second host differs, and it joins while the command waits for it.
    changed = second.folder / "errors.py"
    changed.write_text((ROOT / "pipeline" / "errors.py").read_text() + "\n# another release\n")
    second("mount", "--bind", "/mnt/errors.py", f"{ROOT}/pipeline/errors.py")
    waiting = first.start("driver.log", *train(address, "refused", "--cluster.workers", "2"))
    missing = re.compile(
        r"waiting for the cluster.* 2 workers need 1 CPU each .* 1 of them fits the cluster: \S+ has 1 CPU"
    )
    until(lambda: missing.search(first.log("driver.log")) or waiting.poll() is not None, "the wait is reported", 400)
    start_ray(second, "--address", address)
    assert waiting.wait(400) == 1, first.log("driver.log")
    output = first.log("driver.log")
    assert "the cluster has what the workers need, after" in output
    assert re.search(rf"detr: node {second.address} \(host-b\): has other code", output), output
    second("umount", f"{ROOT}/pipeline/errors.py")

    (second.folder / "nothing").mkdir()
    for package in ("shards", "detr", "pipeline", "jobs"):
        second("mount", "--bind", "/mnt/nothing", f"{ROOT}/{package}")
    output = first(*train(address, "refused", "--cluster.workers", "2"), status=1)
    assert re.search(rf"detr: node {second.address} \(host-b\): has no detr-cluster package", output), output
    for package in ("shards", "detr", "pipeline", "jobs"):
        second("umount", f"{ROOT}/{package}")

    output = first(*train(address, "refused", "--cluster.workers", "2", storage="/mnt/runs"), status=1)
    assert re.search(rf"detr: node {second.address} \(host-b\): storage /mnt/runs does not show", output), output

    output = first(*train(address, "refused", "--cluster.gpu", "yes", "--cluster.wait-s", "2"), status=75)
    assert re.search(r"detr: 2 workers need 1 CPU and 1 GPU each on a node, and none of them fits", output), output
    assert site.rows("select count(*) from runs") == [(0,)]
    first.kill()
    second.kill()


def test_a_run_continues_without_a_host_and_then_on_another_one(site: Site) -> None:
    first, second, third = (site.host(name) for name in ("host-c", "host-d", "host-e"))
    address = start_head(first)
    start_ray(second, "--address", address)
    wait_for_ray(second)
    for host in (first, second):
        pace(host, 0.4)
    words = ["--cluster.workers", "2", "--cluster.min-workers", "1"]
    driver = first.start("driver.log", *train(address, "moved", *words))

    def trained(step: int) -> None:
        until(lambda: site.saved("moved") >= step or driver.poll() is not None, f"step {step}", 600)
        assert driver.poll() is None, first.log("driver.log")

    trained(5)
    second.cut()
    reached = site.saved("moved")
    trained(reached + 10)
    ranks = {line.split()[2] for file in first.folder.glob("[0-9]*") for line in file.read_text().splitlines()}
    assert ranks == {"1", "2"}
    first.kill()
    driver.wait()

    address = start_head(third)
    output = third(*train(address, "moved", *words))
    assert re.search(r"continues at step \d+ of 60", output), output
    assert site.rows("select name, status from runs") == [("moved", "FINISHED")]
    points = site.rows("select step, count(*) from metrics where key = 'train/loss' group by step")
    assert points
    assert {count for _, count in points} == {1}
    output = third(*DETR, "evaluate", "models:/detr-overfit@best", "--data", "s3://sets/val")
    assert "AP50" in output


def test_an_autoscaler_that_has_no_node_yet_starts_them_for_a_run(site: Site) -> None:
    host = site.host("host-f")
    kinds = {
        "ray.head.default": {"resources": {}, "node_config": {}, "max_workers": 0},
        "node": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    provider = {"type": "fake_multinode"} | dict.fromkeys(
        ("disable_node_updaters", "disable_launch_config_check"), True
    )
    lists = ("cluster_synced_files", "initialization_commands", "setup_commands", "rsync_exclude", "rsync_filter")
    steps = [f"{kind}_{what}_commands" for kind in ("head", "worker") for what in ("setup", "start_ray")]
    scaling = {
        "cluster_name": "scaled",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": kinds,
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{name: [] for name in (*lists, *steps)},
    }
    (host.folder / "scaling.json").write_text(json.dumps(scaling))
    host.environment |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    address = start_head(host, "--autoscaling-config=/mnt/scaling.json", cpus=0)
    words = ["--cluster.workers", "2", "--cluster.wait-s", "120", "--optim.max-steps", "3", "--evaluate.limit", "2"]
    output = host(*train(address, "scaled", *words))
    assert re.search(r"waiting for the cluster.* 2 workers need 1 CPU each .* none of them fits", output), output
    assert "the cluster has what the workers need" in output
    assert site.saved("scaled") == 3
    host.kill()


def test_a_job_trains_on_a_host_that_has_never_seen_this_package(site: Site, detr: Command) -> None:
    host = site.host("host-g")
    for name in ("PYTHONPATH", "DETR_RECORD"):
        del host.environment[name]
    (host.folder / "nothing").mkdir()
    for package in ("shards", "detr", "pipeline", "jobs"):
        host("mount", "--bind", "/mnt/nothing", f"{ROOT}/{package}")
    host(sys.executable, "-c", "import jobs.cli", status=1)
    words = ["--head", "--port", "6379", "--dashboard-host", host.address, "--dashboard-port", "8265"]
    start_ray(host, *words)
    wait_for_ray(host)
    url, token = f"http://{host.address}:8265", site.environment["RAY_AUTH_TOKEN"]
    until(lambda: answers(url, token), "the job server answers", 300)
    (detr.folder / "detr.toml").write_text(f"""
        [clusters.far]
        launcher = "ray"
        address = "{url}"
        token = "env:FAR_TOKEN"
        python = "{sys.executable}"
        storage = "s3://sets/runs"
        mlflow = "{site.environment["MLFLOW_TRACKING_URI"]}"
        secrets = {{AWS_SECRET_ACCESS_KEY = "env:AWS_SECRET_ACCESS_KEY"}}
        """)
    detr.env |= site.store.environment | {"FAR_TOKEN": token}
    training = [*TRAIN, "--data.train", "s3://sets/train", "--data.val", "s3://sets/val", "--optim.max-steps", "10"]
    training += ["--cluster.workers", "1"]
    checked = detr("clusters", "check", "far", "--", *training)
    assert "every node that can hold a worker has the same code" in checked
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    output = detr("submit", "far", "--follow", "--", *training, "--run", "travelled")
    sent = re.search(r"snapshot    \d+ files, [\d.]+ MB, commit (\S+)", output)
    assert sent, output
    assert sent[1].removesuffix("-dirty") == commit.strip()
    assert site.rows("select status from runs where name = 'travelled'") == [("FINISHED",)]
    query = "from tags join runs using (run_uuid) where name = 'travelled' and key = 'mlflow.source.git.commit'"
    assert site.rows(f"select value {query}") == [(sent[1],)]
    versions = "select count(*) from model_versions join runs on run_id = run_uuid where runs.name = 'travelled'"
    assert site.rows(versions) == [(1,)]
    listed = detr("jobs", "list", "--cluster", "far") + checked + output
    with urllib.request.urlopen(_request(f"{url}/api/jobs/", token), timeout=60) as shown:
        listed += shown.read().decode()
    kept = [path for path in (site.store.root, detr.folder) for path in path.rglob("*") if path.is_file()]
    for secret in (site.store.environment["AWS_SECRET_ACCESS_KEY"], token):
        assert secret not in listed
        assert not [path for path in kept if secret.encode() in path.read_bytes()]
    host.kill()


def answers(url: str, token: str) -> bool:
    """Whether a job server answers; it opens its port seconds before."""
    try:
        urllib.request.urlopen(_request(f"{url}/api/version", token), timeout=60).close()
    except OSError:
        return False
    return True


def _request(url: str, token: str) -> urllib.request.Request:
    return urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
