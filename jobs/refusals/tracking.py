"""Checks of MLflow: that it answers, and knows the runs and models that a command names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.clusters.entries import Cluster
from jobs.clusters.file import is_loopback
from jobs.errors import JobError
from jobs.plan import Request
from jobs.refusals.places import is_here
from pipeline.tracking.server.address import refuse_uri_with_secret, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


def check_tracking(cluster: Cluster) -> None:
    """Raise if the cluster would not reach MLflow, or if it does not answer here."""
    if not cluster.mlflow:
        refuse_uri_with_secret()
    uri = cluster.mlflow or tracking_uri()
    if cluster.sees_alone(uri):
        return
    is_file = uri.startswith(("sqlite:", "file:", "/", "."))
    if not is_here(cluster) and (is_file or is_loopback(uri)):
        what = "a file of this machine" if is_file else "this machine's own server"
        raise JobError(
            f"MLflow at {uri} is {what}, which {cluster.name} does not reach; expected a server that it reaches: `mlflow` of "
            "the entry, or MLFLOW_TRACKING_URI"
        )
    from pipeline.cluster.node_check import tracking_problem

    problem = tracking_problem(uri)
    if problem:
        hint = (
            ""
            if is_here(cluster)
            else f", or, if only {cluster.name} reaches it, its address in `on_cluster` of the entry"
        )
        raise JobError(f"no MLflow answers at {uri} ({problem}); expected a server that runs: check the address{hint}")


def check_names(cluster: Cluster, request: Request) -> None:
    """Raise for a run or a registered model that MLflow does not know."""
    if not (request.model or request.known_run):
        return
    if cluster.sees_alone(cluster.mlflow or tracking_uri()):
        return
    from pipeline.tracking.mlflow_client import connect

    client = connect(cluster.mlflow or None)
    if request.model:
        from pipeline.registry.versions import find_version

        find_version(client, request.model)
    if request.known_run:
        _find_run(client, request.known_run)


def _find_run(client: MlflowClient, name: str) -> None:
    if name.startswith("models:/"):
        from pipeline.registry.versions import run_of

        run_of(client, name)
    elif "/" not in name:
        from pipeline.tracking.mlflow_runs import find_run

        find_run(client, name)
