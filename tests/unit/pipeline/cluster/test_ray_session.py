"""The connection to Ray: process groups of its servers, its thread, and the processes that it starts early."""

import gc
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from subprocess import Popen
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle

from pipeline.cluster import ray_internals, ray_session, worker_start
from pipeline.cluster.ray_session import (
    BARE,
    WORKER,
    Connection,
    LocalRay,
    setup_hook,
    start_workers_early,
    wait_for_head,
)
from pipeline.errors import PipelineError, Postponed
from pipeline.recipes import RECIPES
from tests.support.ray_nodes import free_port


def start_server() -> Any:
    from ray._private import services

    return services.ConsolePopen([sys.executable, "-c", "import time; time.sleep(60)"])


def end(server: Popen[bytes]) -> None:
    server.kill()
    server.wait()


def test_servers_lead_their_own_process_groups_and_are_watched() -> None:
    local = LocalRay()
    with local.outside_the_group():
        server = start_server()
    try:
        assert os.getpgid(server.pid) == server.pid != os.getpgid(0)
        assert not local.gone()
    finally:
        end(server)
    assert local.gone()


def test_servers_started_after_the_block_are_not_changed() -> None:
    local = LocalRay()
    with local.outside_the_group():
        pass
    server = start_server()
    try:
        assert os.getpgid(server.pid) == os.getpgid(0)
        assert not local.gone()
    finally:
        end(server)
    assert not local.gone()


def test_no_server_outlives_a_start_that_fails() -> None:
    servers: list[Popen[bytes]] = []

    def fail_to_start() -> None:
        with LocalRay().outside_the_group():
            servers.append(start_server())
            raise RuntimeError("the first of them does not answer")

    with pytest.raises(RuntimeError, match="does not answer"):
        fail_to_start()
    assert servers[0].returncode == -signal.SIGKILL


def test_an_error_of_the_connection_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PipelineError("no Ray cluster answers")

    shut_down: list[bool] = []
    monkeypatch.setattr(ray_session, "wait_for_head", lambda *_: None)
    monkeypatch.setattr(ray_session, "join_cluster", refuse)
    monkeypatch.setattr(ray, "shutdown", lambda: shut_down.append(True))
    connection = Connection(RECIPES["demo"], "10.0.0.7:6379", verbose=False)
    with pytest.raises(PipelineError, match="no Ray cluster answers"):
        connection.wait()
    connection.close()
    assert shut_down


def test_a_head_that_comes_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_session, "_HEAD_AGAIN_S", 0.05)
    port, lines = free_port(), list[str]()
    with socket.socket() as head:

        def waits(line: str) -> None:
            lines.append(line)
            head.bind(("127.0.0.1", port))
            head.listen()

        wait_for_head(f"127.0.0.1:{port}", 20, waits, threading.Event())
    assert lines == [f"waiting for the Ray cluster at 127.0.0.1:{port}, 20 s at most: Connection refused"]


def test_a_head_that_never_comes_leaves_the_run_to_a_later_try() -> None:
    address = f"ray://127.0.0.1:{free_port()}"
    with pytest.raises(Postponed, match=rf"^no Ray cluster answers at {address} \(Connection refused\); .* 0.1 s"):
        wait_for_head(address, 0.1, lambda _: None, threading.Event())


def test_an_unknown_host_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unknown)
    with pytest.raises(PipelineError, match="Name or service not known") as raised:
        wait_for_head("hed:6379", 60, lambda _: None, threading.Event())
    assert not isinstance(raised.value, Postponed)


def test_the_thread_that_starts_ray_lives_until_the_connection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's servers ask the kernel to end with their parent, which is the thread that has started them."""
    threads: list[threading.Thread] = []
    monkeypatch.setattr(ray_session, "start_local_ray", lambda *_: threads.append(threading.current_thread()))
    monkeypatch.setattr(ray_session, "start_workers_early", lambda *_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    connection = Connection(RECIPES["demo"], None, verbose=False)
    connection.wait()
    threads[0].join(0.2)
    assert threads[0].is_alive()
    connection.close()
    threads[0].join(60)
    assert not threads[0].is_alive()


@pytest.mark.parametrize("slow", [2, 3])
def test_a_ray_that_a_busy_machine_did_not_start_is_started_anew(monkeypatch: pytest.MonkeyPatch, slow: int) -> None:
    servers: list[Popen[bytes]] = []

    def init(**_: object) -> None:
        servers.append(start_server())
        if len(servers) <= slow:
            raise Exception("The current node timed out during startup. This could happen because")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray_session, "start_workers_early", lambda *_: None)
    connection = Connection(RECIPES["demo"], None, verbose=False)
    try:
        if slow == 2:
            connection.wait()
            assert not connection.local.gone()
        else:
            with pytest.raises(Postponed, match="within 30 s; expected a less busy one"):
                connection.wait()
        assert [server.poll() for server in servers[:slow]] == [-signal.SIGKILL] * slow
        assert len(servers) == 3
    finally:
        connection.local.kill()
        connection.close()


def test_processes_are_asked_for_where_workers_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int, bool]] = []

    def start(node: Mapping[str, Any], count: int, environment: Mapping[str, str]) -> None:
        asked.append((node["NodeID"], count, environment == WORKER))

    sizes = {"a": 9, "b": 4, "c": 8}
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"CPU": cpus}} for name, cpus in sizes.items()]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "b"))
    monkeypatch.setattr(ray_internals, "start_processes", start)
    start_workers_early({"CPU": 4}, workers=3)
    assert asked == [("b", 1, False), ("b", 1, True), ("a", 2, True), ("c", 0, True)]


def test_a_process_prepares_itself_for_what_it_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    monkeypatch.setattr(worker_start, "prepare_worker", lambda: prepared.append("worker"))
    monkeypatch.setattr(worker_start, "prepare_controller", lambda: prepared.append("controller"))
    hook = cloudpickle.loads(cloudpickle.dumps(setup_hook()))
    for environment in (BARE, WORKER):
        monkeypatch.setenv("DETR_PROCESS", environment["DETR_PROCESS"])
        hook()
    monkeypatch.delenv("DETR_PROCESS")
    hook()
    assert prepared == ["worker", "controller"]


def test_modules_are_imported_without_a_look_for_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []

    def import_module(name: str) -> None:
        enabled.append(gc.isenabled())
        if name == "missing":
            raise ImportError(name)

    monkeypatch.setattr(worker_start.importlib, "import_module", import_module)
    worker_start.import_all(["missing", "present"])
    assert enabled == [False, False]
    assert gc.isenabled()
