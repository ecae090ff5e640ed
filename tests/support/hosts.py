"""Hosts on this machine that share nothing but a network: namespaces of network, mounts, host name and processes.

Each has a folder of its own as /mnt and another as /tmp, and its name resolves to 127.0.1.1, as on Debian. This needs
root and the commands `ip`, `unshare` and `nsenter`.
"""

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

_SETUP = """
set -e
hostname "$1"
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/etc-hosts" /etc/hosts
mount --bind "$2" /mnt
mount --bind "$2/tmp" /tmp
touch /mnt/ready
exec sleep infinity
"""


def reason_without_hosts() -> str:
    """Return the reason why this machine cannot have such hosts, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if Path(__file__).is_relative_to("/tmp"):
        return "the project lies below /tmp, of which each host has its own"
    for command in ("ip", "unshare", "nsenter"):
        if shutil.which(command) is None:
            return f"the command `{command}` is missing"
    try:
        with network():
            subprocess.run(["unshare", "--mount", "--uts", "--pid", "--fork", "true"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        return f"namespaces cannot be made here: {error.stderr.decode().strip() or error}"
    return ""


class Host:
    """A host with an address of its own; `folder` is its /mnt, and everything that it starts ends with it."""

    def __init__(self, name: str, address: str, link: str, folder: Path, environment: dict[str, str]) -> None:
        self.name, self.address, self.folder = name, address, folder
        self.environment = environment | {"HOME": "/mnt", "DETR_CACHE": "/mnt/cache", "DETR_SCRATCH": "/mnt/scratch"}
        self._link = link
        self._started: list[subprocess.Popen[bytes]] = []
        for own in ("tmp", "cache"):
            (folder / own).mkdir(parents=True)
        (folder / "etc-hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        unshare = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child"]
        self._first = subprocess.Popen(
            ["ip", "netns", "exec", link, *unshare, "sh", "-c", _SETUP, "host", name, str(folder)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _until(lambda: (folder / "ready").exists(), f"host {name} is there")
        (self._pid,) = [child.pid for child in psutil.Process(self._first.pid).children()]

    def start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a command in the host's folder, with its output in the file `log` there, and return at once."""
        enter = ["nsenter", "--target", str(self._pid), "--net", "--mount", "--uts", "--pid"]
        with (self.folder / log).open("wb") as file:
            process = subprocess.Popen(
                [*enter, "sh", "-c", 'cd /mnt && exec "$@"', "host", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self._started.append(process)
        return process

    def log(self, name: str) -> str:
        """Return what a command has written into this log so far."""
        return (self.folder / name).read_text()

    def __call__(self, *command: str, status: int = 0, timeout_s: float = 600) -> str:
        """Run a command to its end and return its output; fail unless it exits with `status`."""
        process = self.start("command.log", *command)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            process.wait()
        assert process.returncode == status, self.log("command.log")
        return self.log("command.log")

    def cut(self) -> None:
        """Take the cable out: packets to and from the host are lost."""
        _ip("link", "set", f"{self._link}h", "down")

    def kill(self) -> None:
        """End the host with all that runs on it, as a power cut does."""
        if self._first.poll() is None:
            os.kill(self._pid, signal.SIGKILL)
            self._first.wait()
        for process in self._started:
            process.wait()


class Network:
    """Hosts on one bridge, whose address `gateway` is this machine's."""

    def __init__(self, name: str, prefix: str, stack: ExitStack) -> None:
        self.gateway = f"{prefix}.1"
        self._name, self._prefix, self._stack, self._hosts = name, prefix, stack, 0

    def add(self, name: str, folder: Path, environment: dict[str, str]) -> Host:
        """Return another host; it ends with the network."""
        self._hosts += 1
        number = self._hosts
        link, address = f"{self._name}{number}", f"{self._prefix}.{number + 1}"
        _ip("netns", "add", link)
        self._stack.callback(_ip, "netns", "del", link)
        _ip("link", "add", f"{link}h", "type", "veth", "peer", "name", "eth0", "netns", link)
        _ip("link", "set", f"{link}h", "master", self._name, "up")
        for words in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            _ip("-n", link, *words)
        _ip("-n", link, "link", "set", "lo", "up")
        _ip("-n", link, "route", "add", "default", "via", self.gateway)
        host = Host(name, address, link, folder, environment)
        self._stack.callback(host.kill)
        return host


@contextmanager
def network() -> Iterator[Network]:
    """Yield a network without hosts; it and its hosts end with the block."""
    number = secrets.randbelow(200) + 20
    name, prefix = f"dt{secrets.token_hex(3)}", f"10.213.{number}"
    with ExitStack() as stack:
        _ip("link", "add", name, "type", "bridge")
        stack.callback(_ip, "link", "del", name)
        _ip("addr", "add", f"{prefix}.1/24", "dev", name)
        _ip("link", "set", name, "up")
        yield Network(name, prefix, stack)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)
