"""Waits for nodes, with lists of nodes in place of a cluster."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import ray

from pipeline.cluster.capacity import (
    Node,
    check_this_machine,
    describe_lack,
    takes_gpus,
    wait_for_capacity,
    workers_that_fit,
)
from pipeline.config import ClusterConfig
from pipeline.errors import Postponed, RunConfigError
from pipeline.recipes import RECIPES

EIGHT_GPUS = RECIPES["detr-r50-8gpu"].cluster


def nodes(*resources: dict[str, float]) -> list[Node]:
    return [Node(f"10.0.0.{number}", each) for number, each in enumerate(resources, 1)]


class Joining:
    """A cluster that has another set of nodes at each look, the last one for ever."""

    def __init__(self, *looks: list[Node]) -> None:
        self._looks = list(looks)
        self.lines: list[str] = []
        self.asked: list[tuple[int, Mapping[str, float]]] = []

    def wait(self, cluster: ClusterConfig, most: Mapping[str, float] | None = None) -> bool:
        return wait_for_capacity(
            cluster,
            self.lines.append,
            lambda workers, each: self.asked.append((workers, each)),
            most,
            lambda: self._looks.pop(0) if len(self._looks) > 1 else self._looks[0],
            look_s=0.01,
        )


def test_workers_are_counted_per_node_and_not_by_totals() -> None:
    each = {"CPU": 4, "GPU": 1}
    assert workers_that_fit(nodes({"CPU": 6, "GPU": 4}, {"CPU": 10, "GPU": 4}, {"CPU": 16}), each) == 3
    assert workers_that_fit(nodes(*[{"CPU": 3.0, "GPU": 8.0}] * 64), each) == 0


def test_nodes_that_join_later_are_waited_for_and_asked_for() -> None:
    cluster = ClusterConfig(workers=2, gpu="no", cpus_per_worker=4)
    joining = Joining(nodes({"CPU": 7}), nodes({"CPU": 7}), nodes({"CPU": 7}, {"CPU": 4}))
    assert joining.wait(cluster) is False
    first, last = joining.lines
    assert "2 workers need 4 CPU each on a node, and 1 of them fits the cluster: 10.0.0.1 has 7 CPU" in first
    assert "the cluster has what the workers need" in last
    assert {(workers, each["CPU"]) for workers, each in joining.asked} == {(2, 4)}


def test_a_cluster_that_is_there_is_not_waited_for() -> None:
    joining = Joining(nodes({"CPU": 2}))
    joining.wait(ClusterConfig(workers=2, wait_s=0))
    assert (joining.lines, joining.asked) == ([], [])


def test_an_elastic_run_waits_for_its_fewest_workers() -> None:
    cluster = ClusterConfig(workers=8, min_workers=2, wait_s=0)
    Joining(nodes({"CPU": 2})).wait(cluster)
    with pytest.raises(Postponed, match=r"^at least 2 workers need 1 CPU each .* --cluster.min-workers 1 "):
        Joining(nodes({"CPU": 1})).wait(cluster)


def test_promised_gpus_that_do_not_come_end_with_status_75_and_never_become_cpus() -> None:
    with pytest.raises(
        Postponed, match=r"none of them fits .*: 10\.0\.0\.1 has 999 CPU and 0 GPU; expected .*"
    ) as caught:
        Joining(nodes({"CPU": 999})).wait(replace(EIGHT_GPUS, wait_s=0))
    assert caught.value.exit_status == 75
    assert "\n" not in str(caught.value)
    assert "--cluster.gpu no" in str(caught.value)


def test_auto_decides_when_the_nodes_are_there() -> None:
    cluster = ClusterConfig(workers=2, wait_s=5)
    assert Joining(nodes({"CPU": 8})).wait(cluster) is False
    assert Joining(nodes({"CPU": 8, "GPU": 1}), nodes({"CPU": 8, "GPU": 2})).wait(cluster) is True
    assert Joining(nodes({"CPU": 8}), nodes({"CPU": 8, "GPU": 2})).wait(cluster, most={"GPU": 2}) is True
    assert takes_gpus(cluster, nodes({"CPU": 8}), {"CPU": 64, "GPU": 0}) is False


def test_kinds_of_nodes_are_counted_and_few_are_shown() -> None:
    many = nodes(*[{"CPU": 2.0}] * 9, *[{"CPU": float(count)} for count in range(3, 9)])
    text = describe_lack(ClusterConfig(workers=99), many, gpu=False)
    assert "9 nodes of 2 CPU, 10.0.0.10 has 3 CPU" in text
    assert text.endswith("3 other kinds of nodes")


def test_this_machine_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(**resources: float) -> None:
        monkeypatch.setattr(
            ray,
            "nodes",
            lambda: [{"Alive": True, "NodeID": "a", "NodeManagerAddress": "127.0.0.1", "Resources": resources}],
        )

    machine(CPU=2)
    assert check_this_machine(ClusterConfig(workers=8, cpus_per_worker=9)) is False
    for gpus in (0, 7):
        machine(CPU=2, GPU=gpus)
        with pytest.raises(
            RunConfigError, match=rf"^this machine has {gpus} GPUs but 8 workers .*--address.*--cluster.gpu no.*--smoke"
        ):
            check_this_machine(EIGHT_GPUS)
    with pytest.raises(RunConfigError, match=r"has 7 GPUs for 8 workers; .*--cluster.workers 7 .*--cluster.gpu no"):
        check_this_machine(replace(EIGHT_GPUS, gpu="auto"))
    machine(CPU=2, GPU=8)
    assert check_this_machine(EIGHT_GPUS) is True
