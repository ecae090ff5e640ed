"""Checks of numbers: whether the nodes that a cluster has, or can have, hold the workers of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jobs.clusters.entries import Cluster
from jobs.errors import JobError
from jobs.plan import Request, workers_of

Sizes = Sequence[tuple[float, float]]
"""CPUs and GPUs of each node."""


def check_workers(cluster: Cluster, request: Request) -> None:
    """Raise `JobError` if the nodes of the entry can never hold the workers."""
    nodes = cluster.nodes
    if request.config is None or nodes is None:
        return
    needs = workers_of(request.config, cluster)
    if needs.gpus and not nodes.gpus:
        raise JobError(
            f"the workers need a GPU each, and the nodes of {cluster.name} have none; expected nodes.gpus in its entry, "
            "another cluster, or --cluster.gpu no"
        )
    fit = nodes.most * needs.per_node(nodes.gpus, nodes.cpus)
    if fit < needs.fewest:
        each = f"{needs.cpus} CPUs" + (" and a GPU" if needs.gpus else "")
        sizes = [f"{count} {kind}" for count, kind in ((nodes.gpus, "GPUs"), (nodes.cpus, "CPUs")) if count]
        node = " and ".join(sizes)
        raise JobError(
            f"{needs.fewest} workers of {each} do not fit {cluster.name}: at most {nodes.most} nodes of {node} hold {fit}; "
            "expected as many at least: lower --cluster.workers or --cluster.cpus-per-worker, or raise nodes"
        )


def check_now(cluster: Cluster, request: Request, sizes: Sizes) -> None:
    """Raise `JobError` if the nodes that a running cluster has now cannot hold the workers, and none can be added."""
    if request.config is None or cluster.nodes is not None:
        return
    wanted = request.config.cluster
    gpus = wanted.gpu == "yes" or (wanted.gpu == "auto" and any(gpu for _, gpu in sizes))
    remedy = f"or, if it can add nodes, say how many: nodes = {{max = N, ...}} of the entry {cluster.name}"
    if wanted.gpu == "yes" and not any(gpu for _, gpu in sizes):
        raise JobError(
            f"the workers need a GPU each, and no node of {cluster.name} has one; expected GPUs: take --cluster.gpu no, "
            + remedy
        )
    fit = sum(min(int(cpu // wanted.cpus_per_worker), int(gpu) if gpus else wanted.workers) for cpu, gpu in sizes)
    if fit < wanted.fewest:
        kinds = Counter(sizes).most_common(3)
        there = ", ".join(
            f"{count} of {cpu:g} CPUs{f' and {gpu:g} GPUs' if gpu else ''}" for (cpu, gpu), count in kinds
        )
        raise JobError(
            f"{wanted.fewest} workers of {wanted.cpus_per_worker} CPUs{' and a GPU' if gpus else ''} do not fit "
            f"{cluster.name}: its nodes ({there or 'none'}) hold {fit}; expected as many at least: lower --cluster.workers or "
            f"--cluster.cpus-per-worker, {remedy}"
        )
