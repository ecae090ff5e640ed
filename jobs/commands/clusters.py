"""Subcommands for clusters: list the entries, check one, and the probe that a check runs there."""

from __future__ import annotations

import secrets
import sys
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from jobs.clusters.entries import Cluster
from jobs.parsing import Command, UsageError, choose, parse
from jobs.training import parse_train

_WAIT_S = 300


@dataclass(frozen=True)
class Check:
    """Run the probe on a cluster: `detr clusters check NAME [-- train RECIPE ...]`.

    Every node that can hold a worker is asked for its code and versions, storage, data, MLflow, GPUs and the network
    between nodes; each problem is a line that names the node. With a training, its data and resources are looked at.
    """

    cluster: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the entry."""


def clusters(argv: list[str]) -> None:
    """Run `detr clusters [check NAME]`."""
    if not argv:
        _list()
        return
    choose(
        argv,
        {
            "check": Command("Run the probe on a cluster: check NAME [-- train RECIPE ...]", _check),
            "probe": Command("Look at the nodes of the Ray cluster here, as `check` does there", _probe),
        },
        "detr clusters",
    )


def _list() -> None:
    from jobs.clusters.file import files, read_clusters
    from pipeline.display.terminal import table

    found = read_clusters()
    rows = [(name, entry.launcher, entry.where, _nodes(entry), entry.storage) for name, entry in found.items()]
    print(table(("cluster", "launcher", "where", "nodes", "storage"), rows))
    if len(found) == 1:
        print(f"describe others as [clusters.NAME] in {' or '.join(map(str, files()))}", file=sys.stderr)


def _nodes(entry: Cluster) -> str:
    nodes = entry.nodes
    if nodes is None:
        return ""
    count = f"{nodes.fewest} to {nodes.most}" if nodes.elastic else str(nodes.most)
    return f"{count} x {nodes.gpus} {nodes.accelerator or 'GPUs'}" if nodes.gpus else f"{count} x {nodes.cpus} CPUs"


def _check(argv: list[str]) -> None:
    own, training = argv, []
    if "--" in argv:
        own, training = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    options = parse(Check, own, "detr clusters check")
    if training and training[0] != "train":
        raise UsageError(
            f"got {training[0]!r} after --; expected `detr clusters check {options.cluster} -- train RECIPE ...`"
        )
    from jobs.clusters import find_cluster
    from jobs.code import Code, code_here
    from jobs.engines import engine_of
    from jobs.plan import Request, make_plan
    from jobs.refusals import check, check_file, read_request
    from pipeline.tracking.server.address import tracking_uri

    cluster = find_cluster(options.cluster)
    request = read_request(cluster, training or _any_training(cluster))
    check(cluster, request if training else Request(()), lambda text: print(text, file=sys.stderr))
    code = code_here() if cluster.code == "snapshot" else Code.installed()
    probe = Request(("clusters", "probe", *request.argv[1:]))
    plan = make_plan(cluster, probe, code, secrets.token_hex(4), tracking_uri())
    engine = engine_of(cluster)
    check_file(cluster, engine.render(plan))
    job = engine.submit(plan, print)
    print(f"submitted   {job} to {cluster.name} ({cluster.launcher})", flush=True)
    try:
        engine.logs(cluster, job, sys.stdout, follow=True)
    except KeyboardInterrupt:
        print(engine.stop(cluster, job), file=sys.stderr)
        raise


def _any_training(cluster: Cluster) -> list[str]:
    """Return a training that wants a worker for each GPU, or for each node, of all that the entry is sure to have."""
    nodes = cluster.nodes
    workers = max(nodes.fewest, 1) * max(nodes.gpus, 1) if nodes else 1
    gpu = "yes" if nodes and nodes.gpus else "auto"
    size = ["--cluster.workers", str(workers), "--optim.batch-size", str(max(workers, 64))]
    return ["train", "detr-r50", *size, "--cluster.gpu", gpu, "--cluster.wait-s", str(_WAIT_S)]


def _probe(argv: list[str]) -> None:
    options = parse_train(argv, "detr clusters probe")
    if options is None:
        return
    from pipeline.checkpoint.location import location
    from pipeline.cluster.launch import connected, connecting
    from pipeline.driver.launch import say
    from shards.store import storage

    # The options that `small` chooses by its data change nothing that is looked at here.
    config = replace(options.config, storage=storage.absolute(options.config.storage))
    start = options.start
    with (
        connecting(config, address=start.address or "auto", verbose=start.verbose) as connection,
        connected(config, location(config.storage) / "probe", connection, verbose=start.verbose, say=say),
    ):
        print("every node that can hold a worker has the same code and sees storage, MLflow and the other nodes")
