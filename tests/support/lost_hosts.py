"""Hosts that can be lost: a Ray cluster of which nothing is sure to stay, and folders that only one host sees."""

from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.support.ray_nodes import Node, free_port


class Cluster:
    """A head without CPUs and two nodes of one CPU, all of which can die and come back at the same address."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment, self._port = folder, environment, free_port()
        self.address = f"127.0.0.1:{self._port}"
        self._started = 0
        self._head: Node | None = None
        self._nodes: list[Node] = []

    def start(self) -> None:
        """Start the head and both nodes. One by one, since two that start at a time choose the same ports."""
        self._head = self._node("--head", "--port", str(self._port), "--include-dashboard", "false", cpus=0)
        self._head.wait()
        self._nodes = [self._node("--address", self.address)]
        self._nodes[0].wait()
        self._nodes.append(self._node("--address", self.address))

    def lose_node(self, number: int) -> None:
        """Kill a node and start it again, without what it held."""
        self._nodes[number].kill()
        self._nodes[number] = self._node("--address", self.address)

    def lose_all(self) -> None:
        """Kill every node."""
        for node in [*self._nodes, self._head]:
            if node:
                node.kill()
        self._head, self._nodes = None, []

    def workers(self) -> list[psutil.Process]:
        """Return the training workers."""
        below = [process for node in self._nodes for process in node.below()]
        return [process for process in below if _is_worker(process)]

    def _node(self, *flags: str, cpus: int = 1) -> Node:
        self._started += 1
        folder = self._folder / f"node-{self._started}"
        return Node(folder, host_environment(folder, self._environment), *flags, cpus=cpus)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return any("RayTrainWorker" in word for word in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def host_environment(folder: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Make the folders of a host; return the environment of its processes."""
    (folder / "home").mkdir(parents=True)
    return dict(environment) | {"HOME": str(folder / "home"), "DETR_SCRATCH": str(folder / "scratch")}
