"""Client of Ray Jobs: submit a `detr` command to a cluster, list jobs, read their logs and stop them."""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, TextIO

from jobs.spec import SPECS, Spec
from pipeline.cluster.ray_session import authenticate
from pipeline.errors import PipelineError, RunConfigError
from shards.errors import one_line

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_GRACE_S = 60
# A stopped job has a minute to save a checkpoint; Ray's default kills it after three seconds.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGTERM", "RAY_JOB_STOP_WAIT_TIME_S": str(_GRACE_S)}


class JobError(PipelineError):
    """Raised if the cluster's job server does not answer, or knows no such job."""


def spec_named(name: str, address: str | None = None) -> Spec:
    """Return the spec of this name, with another address if one is given; raise `JobError` for an unknown name."""
    if name not in SPECS:
        raise JobError(f"there is no spec {name!r}; expected one of: {', '.join(SPECS)}")
    spec = SPECS[name]()
    return replace(spec, address=address) if address else spec


def submit(spec: Spec, argv: Sequence[str]) -> str:
    """Start `detr ARGV` on the cluster and return the job's id; raise `RunConfigError` for secrets that Ray would show."""
    from pipeline.tracking.mlflow_client import holds_secret, tracking_uri

    uri = tracking_uri()
    if holds_secret(uri):
        raise RunConfigError(
            "MLFLOW_TRACKING_URI holds a user name or password, which Ray would show with the job; expected none: "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's nodes"
        )
    client = connect(spec)
    command = shlex.join([spec.python, "-m", "jobs.cli", *argv])
    job_id = client.submit_job(
        entrypoint=f"cd {shlex.quote(spec.directory)} && exec {command}",
        submission_id=f"detr-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}",
        runtime_env={"env_vars": {"MLFLOW_TRACKING_URI": uri, **_STOP, **spec.environment}},
        metadata={"command": shlex.join(["detr", *argv])},
    )
    return str(job_id)


def connect(spec: Spec) -> JobSubmissionClient:
    """Return a client of the cluster's job server; raise `JobError` if it does not answer or refuses the token."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray prefers this variable to the address that its client is given, so both must be the same.
    os.environ["RAY_API_SERVER_ADDRESS"] = spec.address
    authenticate()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(spec.address)
    except AuthenticationError:
        raise JobError(
            f"the Ray cluster at {spec.address} refused this machine's token; expected the cluster's: copy its "
            "~/.ray/auth_token here, or set RAY_AUTH_TOKEN_PATH"
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise JobError(
            f"no Ray job server answers at {spec.address} ({one_line(error)}); expected a running cluster: "
            "start one with `ray start --head`, or give --address"
        ) from None


def jobs_table(spec: Spec) -> str:
    """Return a table of the cluster's jobs, newest first."""
    from pipeline.display.terminal import table

    known = [job for job in connect(spec).list_jobs() if job.submission_id]
    known.sort(key=lambda job: job.start_time or 0, reverse=True)
    rows = [
        (
            str(job.submission_id),
            str(job.status.value),
            f"{datetime.fromtimestamp((job.start_time or 0) / 1000):%Y-%m-%d %H:%M}",
            (job.metadata or {}).get("command", job.entrypoint),
        )
        for job in known
    ]
    return table(("job", "status", "started", "command"), rows)


def status(spec: Spec, job_id: str) -> str:
    """Return PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED; raise `JobError` for an unknown job."""
    try:
        return str(connect(spec).get_job_status(job_id).value)
    except RuntimeError:
        raise JobError(f"there is no job {job_id!r} on {spec.address}; see `detr jobs list`") from None


def logs(spec: Spec, job_id: str) -> str:
    """Return all output of the job so far."""
    status(spec, job_id)
    return str(connect(spec).get_job_logs(job_id))


def follow_logs(spec: Spec, job_id: str, stream: TextIO) -> None:
    """Copy the job's log to `stream` until the job ends; raise `JobError` if it did not succeed."""
    status(spec, job_id)
    client = connect(spec)

    async def copy() -> None:
        async for lines in client.tail_job_logs(job_id):
            stream.write(lines)
            stream.flush()

    asyncio.run(copy())
    final = status(spec, job_id)
    if final != "SUCCEEDED":
        raise JobError(f"job {job_id} ended as {final}; its log says why: `detr jobs logs {job_id}`")


def stop(spec: Spec, job_id: str, *, wait_s: float = 75.0) -> str:
    """Interrupt the job, wait at most `wait_s` seconds until it has ended, and return a line that says how it ended."""
    if status(spec, job_id) in ("SUCCEEDED", "FAILED", "STOPPED"):
        return f"{job_id} had already ended"
    client = connect(spec)
    client.stop_job(job_id)
    start = time.monotonic()
    while time.monotonic() < start + wait_s:
        final = status(spec, job_id)
        if final == "STOPPED" and time.monotonic() > start + _GRACE_S:
            return f"{job_id} killed: it did not stop within {_GRACE_S} s"  # Ray calls that stopped, too
        if final in ("SUCCEEDED", "FAILED", "STOPPED"):
            return f"{job_id} {final.lower()}"
        time.sleep(1)
    raise JobError(f"job {job_id} did not end within {wait_s:.0f} s; see `detr jobs logs {job_id}`")
