"""Process groups of Ray's servers, with other programs in their place."""

import os
import signal
import sys
from subprocess import Popen
from typing import Any

import pytest

from pipeline.cluster.ray_session import LocalRay


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
