"""Checks before anything is sent: what would fail on the cluster minutes later is refused here, in a line.

`read_request` parses a training, `check` looks at words, places, MLflow and capacity, cheap checks first. What only the
cluster sees (`on_cluster` of the entry) is left to the probe that every run starts with. No torch is imported.
"""

from __future__ import annotations

from collections.abc import Callable

from jobs.clusters.entries import Cluster
from jobs.plan import Request
from jobs.refusals.places import check_places
from jobs.refusals.tracking import check_names, check_tracking
from jobs.refusals.words import (
    at_address,
    check_file,
    check_words,
    read_request,
    seen_fitted,
    warnings_of,
    with_storage,
)
from jobs.refusals.workers import check_now, check_workers

__all__ = [
    "at_address",
    "check",
    "check_file",
    "check_now",
    "check_words",
    "read_request",
    "seen_fitted",
    "warnings_of",
    "with_storage",
]

Say = Callable[[str], None]


def check(cluster: Cluster, request: Request, say: Say) -> None:
    """Raise the error that the command would end with on the cluster, as far as this machine can tell.

    `say` gets warnings.
    """
    for line in warnings_of(cluster):
        say(line)
    check_workers(cluster, request)
    check_places(cluster, request)
    check_tracking(cluster)
    check_names(cluster, request)
