"""Checks before anything is sent: what would fail on the cluster minutes later is refused here, in a line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import msgspec

from jobs.clusters.entries import Cluster, Ray
from jobs.errors import JobError
from jobs.nearest import nearest
from jobs.plan import Request
from jobs.training import parse_train, smoke
from pipeline.tracking.server.address import refuse_uri_with_secret
from shards.store.storage import refuse_secret

Say = Callable[[str], None]
SUBMITTABLE = ("demo", "shard", "train", "resume", "evaluate", "predict", "register", "import", "export")
"""Commands that make sense on a cluster."""


def read_request(cluster: Cluster, argv: Sequence[str]) -> Request:
    """Return the parsed command, with the defaults of the cluster."""
    for argument in argv:
        refuse_secret(argument)  # launchers show a job's command to everyone who can see the job
    if argv[0] not in SUBMITTABLE:
        raise JobError(
            f"there is no command {argv[0]!r} to submit; did you mean {nearest(argv[0], SUBMITTABLE)}? Expected one of: "
            + ", ".join(SUBMITTABLE)
        )
    if argv[0] != "train":
        return Request(tuple(argv))
    words = list(argv[1:])
    if cluster.storage and not any(re.match("--storage(=|$)", word) for word in words):
        words += ["--storage", cluster.storage]
    options = parse_train(words, "detr train")
    if options is None:
        raise JobError("`train --help` needs no cluster; expected `train RECIPE ...`")
    config = smoke(options.config) if options.smoke else options.config
    return Request(("train", *words), config, options.run or "", options.smoke)


def check(cluster: Cluster, request: Request, say: Say) -> None:
    """Raise the error that the command would end with on the cluster; `say` gets warnings."""
    if not cluster.mlflow:
        refuse_uri_with_secret()
    if request.config is not None:
        from pipeline.driver import preflight

        preflight.check(request.config)


def at_address(cluster: Cluster, address: str) -> Cluster:
    """Return the entry with another address; raise `JobError` if a token would go there."""
    if not isinstance(cluster, Ray):
        raise JobError(f"--address is for Ray clusters, and {cluster.name} is {cluster.launcher}; expected none")
    return msgspec.structs.replace(cluster, address=address)
