"""Notes and claims in a real Ray, whose head is killed, stopped for a while, and asked by several processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from pipeline.cluster.deaths import find_dead, reason_of_death
from pipeline.cluster.notes.claims import cancel_dead_claims
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.ray_internals import RayNotes, cancel_resource_request, jobs_alive
from tests.support.ray_nodes import free_port, node

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Ray's own warnings, in this process

# A driver that claims all that the cluster has, asks for a stop, and is killed.
DRIVER = """
import sys, time, ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)
from pipeline.cluster.notes.claims import record_claim
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.ray_internals import RayNotes

ray.init(address=sys.argv[1], logging_level="ERROR")
record_claim(RayNotes(), "train-dead", ray.get_runtime_context().get_job_id())
client = TrainAutoscalingCoordinatorClient("train-dead")
client.send_resource_request(ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}), 2)
Notes.of_run("run", RayNotes()).request_stop()
print("ready", flush=True)
time.sleep(300)
"""


# A driver at an address `ray://`, which asks for a stop and reads its notes back.
CLIENT = """
import sys, ray
from pipeline.cluster.notes.claims import cancel_dead_claims
from pipeline.cluster.notes.notes import Notes
from pipeline.cluster.ray_internals import RayNotes, cancel_resource_request, jobs_alive

ray.init(sys.argv[1], logging_level="ERROR")
notes = Notes.of_run("through ray", RayNotes())
assert not notes.stop_requested()
assert notes.request_stop()
assert notes.stop_requested()
assert not notes.write("stop", b"later") or notes.read("stop") == b""
assert set(notes.read_all("s") or {}) == {"stop"}
assert cancel_dead_claims(RayNotes(), jobs_alive, cancel_resource_request) == 0
notes.clear()
assert not notes.stop_requested()
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def client_address() -> str:
    """Address `ray://` of the cluster of the module."""
    return f"ray://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, client_address: str) -> Iterator[str]:
    """Address of a cluster of one node with one CPU, which this process has joined."""
    port, environment = free_port(), os.environ | {"RAY_AUTH_MODE": "disabled"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_TRAIN_V2_ENABLED", "1")
        head = ["--head", "--port", str(port), "--include-dashboard", "false"]
        head += ["--ray-client-server-port", client_address.rpartition(":")[2]]
        with node(tmp_path_factory.mktemp("ray"), environment, *head):
            ray.init(address=f"127.0.0.1:{port}", logging_level="ERROR", log_to_driver=False)
            yield f"127.0.0.1:{port}"
            ray.shutdown()


def reserved(requester: str) -> bool:
    """Return True if the coordinator reserves resources for the requester."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    return bool(ray.get(get_or_create_autoscaling_coordinator().get_reserved_resources.remote(requester)))


def test_a_killed_driver_leaves_neither_claims_nor_requests(address: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, address], env=environment, stdout=subprocess.PIPE)
    assert driver.stdout is not None
    assert driver.stdout.readline() == b"ready\n"
    assert cancel_dead_claims(RayNotes(), jobs_alive, cancel_resource_request) == 0
    assert reserved("train-dead")
    driver.kill()
    driver.communicate()
    until = time.monotonic() + 120
    while not cancel_dead_claims(RayNotes(), jobs_alive, cancel_resource_request):
        assert time.monotonic() < until
        time.sleep(0.2)
    assert not reserved("train-dead")
    assert RayNotes().get_all("run/")
    assert not Notes.of_run("run", RayNotes()).stop_requested()
    assert RayNotes().get_all("run/") == {}


def test_workers_and_driver_share_notes_of_which_the_first_writer_wins(address: str) -> None:
    notes = Notes.of_run("run", RayNotes())

    @ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
    def worker(rank: int) -> str | None:
        notes.write_fatal_error(f"error of worker {rank}")
        error = notes.read_fatal_error()
        return error and error.message

    heard = set(ray.get([worker.remote(rank) for rank in range(2)]))
    error = notes.read_fatal_error()
    assert error is not None
    assert heard == {error.message}
    notes.write("position", b"1")
    notes.write("position", b"2", overwrite=True)
    assert (notes.read("position"), set(notes.read_all("p") or {})) == (b"2", {"position"})
    notes.delete("position")
    assert notes.read("position") is None
    notes.clear()
    assert notes.read_fatal_error() is None


def test_a_driver_at_a_distance_has_notes_too(address: str, client_address: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    driver = [sys.executable, "-c", CLIENT, client_address]
    for _ in range(3):
        answer = subprocess.run(driver, env=environment, capture_output=True, text=True, timeout=300, check=False)
        if "Starting Ray client server failed" not in answer.stderr:  # Ray's proxy forks among gRPC's threads
            break
    assert answer.stdout.split()[-1:] == ["done"], answer.stderr[-2000:]


class Worker:
    def pid(self) -> int:
        return os.getpid()


def started_workers(count: int) -> tuple[dict[int, Any], list[int]]:
    """Return actors by rank and their process ids.

    They are detached: Ray may cancel others before they have run ("all references to the actor were removed") although
    their handles are held.
    """
    actor = ray.remote(num_cpus=0)(Worker)
    workers = {rank: actor.options(name=f"worker-{rank}", lifetime="detached").remote() for rank in range(count)}
    return workers, ray.get([worker.pid.remote() for worker in workers.values()], timeout=120)


def test_dead_workers_are_found_by_asking(address: str) -> None:
    workers, pids = started_workers(2)
    assert find_dead(workers) == {}
    os.kill(pids[1], signal.SIGKILL)
    dead = find_dead(workers)
    assert list(dead) == [1]
    assert reason_of_death(dead[1])
    assert find_dead({}) == {}
    ray.kill(workers[0])


def test_a_head_that_does_not_answer_is_no_news_for_a_while(address: str) -> None:
    notes = Notes.of_run("run", RayNotes())
    notes.request_stop()
    (head,) = [p for p in psutil.process_iter(["name", "cmdline"]) if is_head_at(p, address.rpartition(":")[2])]
    head.suspend()
    try:
        before = time.monotonic()
        assert not notes.stop_requested()
        assert time.monotonic() - before < 20
    finally:
        head.resume()
    until = time.monotonic() + 120
    while not notes.stop_requested():
        assert time.monotonic() < until


def is_head_at(process: psutil.Process, port: str) -> bool:
    words = process.info["cmdline"] or []
    return process.info["name"] == "gcs_server" and any(port in word for word in words)
