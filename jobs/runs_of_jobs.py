"""The run that a job trains, as MLflow knows it, and the output of jobs that their launcher has forgotten."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.clusters.entries import Cluster
from jobs.engines.engine import Job
from pipeline.errors import PipelineError
from shards.errors import one_line

_PARENT = "mlflow.parentRunId"

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def client_of(cluster: Cluster) -> MlflowClient:
    """Return a client of the cluster's MLflow that does not wait long; raise `TrackingAway` if it does not answer."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "8")
    if cluster.mlflow:
        os.environ["MLFLOW_TRACKING_URI"] = cluster.mlflow
    from pipeline.tracking.mlflow_client import connect

    return connect()


def run_of(client: MlflowClient, job: str, name: str = "") -> Run | None:
    """Return the run of a job, by the job's name or number or else by the run's name; None if there is none."""
    from pipeline.tracking.mlflow_runs import runs_where
    from pipeline.tracking.tags import TAG_JOB, TAG_JOB_ID

    if "'" in job or "'" in name:
        return None
    conditions = [f"tags.`{tag}` = '{job}'" for tag in (TAG_JOB, TAG_JOB_ID)]
    conditions += [f"attributes.run_name = '{name}'"] if name else []
    found = (runs_where(client, condition, 1) for condition in conditions)
    return next((runs[0] for runs in found if runs), None)


def experiments_link(cluster: Cluster) -> str:
    """Return the link to the experiments of the cluster's MLflow, empty without a server; nothing is asked of it."""
    from pipeline.tracking.pages.links import experiments_page, is_served, ui_address

    if cluster.mlflow:
        os.environ["MLFLOW_TRACKING_URI"] = cluster.mlflow
    return ui_address() + experiments_page() if is_served() else ""


def run_lines(cluster: Cluster, job: Job) -> list[tuple[str, str]]:
    """Return what MLflow knows about the run of a job: progress, warnings and link."""
    from pipeline.display.terminal import clock_time
    from pipeline.tracking.mlflow_client import translated_errors
    from pipeline.tracking.pages.links import run_link
    from pipeline.tracking.progress import read_progress
    from pipeline.tracking.tags import TAG_EPOCHS, TAG_PHASE, TAG_WARNING

    try:
        with translated_errors():
            run = run_of(client_of(cluster), job.id, job.run)
    except PipelineError as error:
        return [("run", f"{job.run or 'unknown'}: {one_line(error)}")]
    if run is None:
        return [("run", f"{job.run}, not in MLflow yet")] if job.run else []
    tags, progress = run.data.tags, read_progress(run.data.tags)
    epochs = f", epoch {progress.epoch:.3g} of {float(tags.get(TAG_EPOCHS, 0)):g}" if progress else ""
    end = progress.ends if progress else None
    ends = f", ends {clock_time(end)}" if end and run.info.status == "RUNNING" else ""
    lines = [("run", f"{run.info.run_name} ({run.info.run_id[:8]}): {tags.get(TAG_PHASE, '')}{epochs}{ends}")]
    lines += [("warning", text) for name, text in sorted(tags.items()) if name.startswith(TAG_WARNING) and text]
    lines.append(("in MLflow", run_link(str(run.info.experiment_id), str(run.info.run_id))))
    return lines


def command_of_run(cluster: Cluster, job: Job) -> list[str]:
    """Return the words of the command that continues the run of a job; empty if it has none.

    A run that is known by its name alone, which others may have given theirs, must lie in the storage of the entry.
    """
    from pipeline.tracking.mlflow_client import translated_errors
    from pipeline.tracking.tags import TAG_FOLDER

    with translated_errors():
        client = client_of(cluster)
        run = run_of(client, job.id)
        if run is None and cluster.storage:
            run = run_of(client, job.id, job.run)
            own = run is not None and str(run.data.tags.get(TAG_FOLDER, "")).startswith(
                f"{cluster.storage.rstrip('/')}/"
            )
            run = run if own else None
    tags = {} if run is None else run.data.tags
    if TAG_FOLDER not in tags or _PARENT in tags:  # a trial: its job is a sweep, whose command the trial does not know
        return []
    return ["detr", "resume", str(tags[TAG_FOLDER])]


def kept_log(cluster: Cluster, job: str) -> str:
    """Return the output of a job that its run keeps, all attempts one after the other; empty if there is none."""
    from pipeline.driver.job import LOGS
    from pipeline.tracking.mlflow_client import translated_errors

    with translated_errors():
        client = client_of(cluster)
        run = run_of(client, job)
        if run is None:
            return ""
        run_id = str(run.info.run_id)
        names = [file.path for file in client.list_artifacts(run_id, LOGS)]
        own = sorted(names, key=lambda name: (len(name), name))
        with tempfile.TemporaryDirectory() as folder:
            return "".join(Path(client.download_artifacts(run_id, name, folder)).read_text() for name in own)
