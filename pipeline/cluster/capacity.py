"""Wait until the cluster has nodes that hold the workers of a run, judged node by node.

Totals do not tell: 8 workers of 4 CPUs fit neither 6 nodes of 6 CPUs nor 64 nodes of one. What others use now counts as
there, because it becomes free: Ray queues the workers, and the run reports that.

A cluster that scales from zero starts nodes only for what asks for them. A placement group asks here. A request by
`ray.autoscaler.sdk.request_resources` would overwrite those of other drivers, and would keep the nodes when this one
dies, while a placement group goes with its driver.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.config import ClusterConfig
from pipeline.errors import Postponed, RunConfigError

_LOOK_S = 1.0
_SAY_AGAIN_S = 60.0  # at most, and only if something has changed
_SHOWN = 4  # kinds of nodes in a message


@dataclass(frozen=True)
class Node:
    """A live node of the cluster, and its resources."""

    address: str
    resources: Mapping[str, float]
    id: str = ""


def alive_nodes() -> list[Node]:
    """Return the live nodes of the connected cluster."""
    import ray

    return [
        Node(node["NodeManagerAddress"], node["Resources"], node["NodeID"]) for node in ray.nodes() if node["Alive"]
    ]


def resources_of_a_worker(cluster: ClusterConfig, gpu: bool) -> dict[str, float]:
    """Return what Ray reserves for each worker."""
    return {"CPU": float(cluster.cpus_per_worker)} | ({"GPU": 1.0} if gpu else {})


def workers_that_fit(nodes: list[Node], each: Mapping[str, float]) -> int:
    """Return the number of workers that the nodes hold, each worker on one of them."""
    return sum(
        min(int(node.resources.get(kind, 0) // count) for kind, count in each.items() if count) for node in nodes
    )


def takes_gpus(cluster: ClusterConfig, nodes: list[Node], most: Mapping[str, float] | None) -> bool:
    """Return True if the workers are to use GPUs.

    `auto` takes them where a node has one, or where the autoscaler can add one (`most`: all that it may add up to).
    """
    if cluster.gpu != "auto":
        return cluster.gpu == "yes"
    return any(node.resources.get("GPU", 0) for node in nodes) or bool(most and most.get("GPU"))


def wait_for_capacity(
    cluster: ClusterConfig,
    say: Callable[[str], None],
    ask: Callable[[int, Mapping[str, float]], None],
    most: Mapping[str, float] | None = None,
    nodes: Callable[[], list[Node]] = alive_nodes,
    look_s: float = _LOOK_S,
) -> bool:
    """Wait until the nodes hold at least the fewest workers of a run; return True if these use GPUs.

    `ask` asks the autoscaler for nodes, and `most` are all resources that it may add up to. Say in one line what is
    missing. Raise `Postponed` after `cluster.wait_s`.
    """
    start = said_at = time.monotonic()
    said = ""
    while True:
        found = nodes()
        gpu = takes_gpus(cluster, found, most)
        each = resources_of_a_worker(cluster, gpu)
        if workers_that_fit(found, each) >= cluster.fewest:
            if said:
                say(f"the cluster has what the workers need, after {time.monotonic() - start:.0f} s")
            return gpu
        lack, waited = describe_lack(cluster, found, gpu), time.monotonic() - start
        if waited >= cluster.wait_s:
            raise Postponed(
                f"{lack}; expected more within {cluster.wait_s} s (--cluster.wait-s): {_remedy(cluster, found, gpu)}"
            )
        if not said or (lack != said and time.monotonic() - said_at >= _SAY_AGAIN_S):
            say(f"waiting for the cluster, {cluster.wait_s - waited:.0f} s at most: {lack}")
            said, said_at = lack, time.monotonic()
        ask(cluster.fewest, each)
        time.sleep(look_s)


def check_this_machine(cluster: ClusterConfig) -> bool:
    """Return True if workers on this machine use GPUs; raise `RunConfigError` if it has too few of them.

    A Ray that was started here has as many CPUs as were requested, and no nodes join it.
    """
    found = alive_nodes()
    gpus = int(sum(node.resources.get("GPU", 0) for node in found))
    gpu = takes_gpus(cluster, found, None)
    if not gpu or gpus >= cluster.fewest:
        return gpu
    fewest = cluster.fewest
    if cluster.gpu == "auto":
        raise RunConfigError(
            f"this machine has {gpus} GPUs for {fewest} workers; expected one each: {_flag(cluster)} {gpus} "
            "(the batch stays the same), or --cluster.gpu no"
        )
    raise RunConfigError(
        f"this machine has {gpus} GPUs but {fewest} workers need one each; expected as many: join a cluster with "
        f"--address, lower {_flag(cluster)}, or train on CPUs with --cluster.gpu no, or try two small steps with --smoke"
    )


def describe_lack(cluster: ClusterConfig, nodes: list[Node], gpu: bool) -> str:
    """Return one line about what the workers need on the nodes, and what these have."""
    each = resources_of_a_worker(cluster, gpu)
    fewest, fit = cluster.fewest, workers_that_fit(nodes, each)
    needed = " and ".join(f"{count:g} {kind}" for kind, count in each.items())
    kinds = Counter(tuple((kind, node.resources.get(kind, 0)) for kind in each) for node in nodes)
    shown = [_describe_nodes(nodes, dict(kind), count) for kind, count in kinds.most_common(_SHOWN)]
    shown += [f"{len(kinds) - _SHOWN} other kinds of nodes"] if len(kinds) > _SHOWN else []
    return (
        f"{'at least ' if fewest < cluster.workers else ''}{fewest} {'worker needs' if fewest == 1 else 'workers need'} "
        f"{needed}{'' if fewest == 1 else ' each'} on a node, and {fit if fit else 'none'} of them "
        f"{'fit' if fit > 1 else 'fits'} the cluster: {', '.join(shown) or 'it has no node'}"
    )


def _describe_nodes(nodes: list[Node], kind: Mapping[str, float], count: int) -> str:
    has = " and ".join(f"{amount:g} {name}" for name, amount in kind.items())
    if count > 1:
        return f"{count} nodes of {has}"
    address = next(node.address for node in nodes if all(node.resources.get(name, 0) == kind[name] for name in kind))
    return f"{address} has {has}"


def _remedy(cluster: ClusterConfig, nodes: list[Node], gpu: bool) -> str:
    remedies = ["add nodes"]
    if fit := workers_that_fit(nodes, resources_of_a_worker(cluster, gpu)):
        remedies.append(f"{_flag(cluster)} {fit} (the batch stays the same)")
    if cluster.cpus_per_worker > 1:
        remedies.append("lower --cluster.cpus-per-worker")
    if gpu:
        remedies.append("train on CPUs with --cluster.gpu no")
    return ", or ".join(remedies)


def _flag(cluster: ClusterConfig) -> str:
    return "--cluster.min-workers" if cluster.min_workers else "--cluster.workers"


@contextmanager
def demand() -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Yield a function that asks the autoscaler for nodes for so many workers, each with such resources.

    What was asked for last counts until the block ends.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    asked: list[tuple[int, dict[str, float]]] = []
    groups: list[ray.util.placement_group.PlacementGroup] = []

    def withdraw() -> None:
        while groups:
            remove_placement_group(groups.pop())

    def ask(workers: int, each: Mapping[str, float]) -> None:
        if asked != [(workers, dict(each))]:
            withdraw()
            asked[:] = [(workers, dict(each))]
            groups.append(placement_group([dict(each)] * workers, strategy="PACK"))

    try:
        yield ask
    finally:
        withdraw()
