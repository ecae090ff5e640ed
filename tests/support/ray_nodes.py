"""Ray nodes on this machine, each a real `ray start` with its own raylet, that a test can take away."""

import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# Below those that the kernel hands out, which a connection could take before a server starts, and above Ray's own.
_PORTS = range(24_100, 32_000)


def free_port(host: str = "127.0.0.1") -> int:
    """A port of an address of this machine that nobody listens at, and that stays free until a test uses it."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port


START_S = 240.0  # a busy machine needs ten times what an idle one does
_AGAIN = """
for attempt in 1 2 3; do
    "$@"
    status=$?
    tail -n 5 "$0" | grep -q "timed out during startup" || exit $status
done
exit $status
"""


def start_command(log: str, *flags: str, cpus: int = 1) -> list[str]:
    """Return the command of a Ray node whose output goes to the file `log`.

    Ray gives a node 30 s to start, which no setting changes. On a busy machine it needs more, and the command starts anew.
    """
    ray = str(Path(sys.executable).with_name("ray"))
    words = [ray, "start", *flags, "--num-cpus", str(cpus), "--disable-usage-stats", "--block"]
    return ["sh", "-c", _AGAIN, log, *words]


class Node:
    """A Ray node of one CPU, or as many as given; `folder` gets its log."""

    def __init__(self, folder: Path, environment: dict[str, str], *flags: str, cpus: int = 1) -> None:
        self._log = folder / f"ray-{len(list(folder.glob('ray-*.log')))}.log"
        command = start_command(str(self._log), *flags, cpus=cpus)
        with self._log.open("x") as log:
            self._process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)

    def wait(self, timeout_s: float = START_S) -> None:
        """Wait until it has joined the cluster."""
        until = time.monotonic() + timeout_s
        while "Ray runtime started" not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < until, self._log.read_text()
            time.sleep(0.2)

    def below(self) -> list[psutil.Process]:
        """Return the processes that it has started, and those that they have."""
        return psutil.Process(self._process.pid).children(recursive=True) if self._process.poll() is None else []

    def kill(self) -> None:
        """SIGKILL it with all that it started, as a machine that loses its power does."""
        below = self.below()
        self._process.kill()
        self._process.wait()
        for child in below:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(below, timeout=20)


@contextmanager
def node(folder: Path, environment: dict[str, str], *flags: str) -> Iterator[Node]:
    """A node that has joined its cluster, and ends with the block."""
    started = Node(folder, environment, *flags)
    try:
        started.wait()
        yield started
    finally:
        started.kill()


def wait_until_open(port: int, timeout_s: float = START_S) -> None:
    """Until something listens at the port."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.3)
    raise AssertionError(f"nothing listens at port {port} after {timeout_s} s")
