"""The same command on a Ray cluster, through Ray Jobs; checked here before anything is sent."""

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
from pipeline.errors import PipelineError, RunConfigError, first_line
from pipeline.launch import authenticate
from shards.storage import refuse_secret

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

# A stop is a Ctrl-C with a minute to leave in order: Ray's default kills after three seconds.
_STOP = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}


class JobError(PipelineError):
    """The cluster's job server does not answer, or knows no such job."""


def spec_named(name: str, address: str | None = None) -> Spec:
    """The spec of this name, at another address where one is given."""
    if name not in SPECS:
        raise JobError(f"there is no spec {name!r}; expected one of: {', '.join(SPECS)}")
    spec = SPECS[name]()
    return replace(spec, address=address) if address else spec


def submit(spec: Spec, argv: Sequence[str]) -> str:
    """Check `detr ARGV` on this machine, then run it on the cluster; return the job's id."""
    check(argv)
    from pipeline.mlflow_store import holds_secret, tracking_uri

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


def check(argv: Sequence[str]) -> None:
    """Refuse here what would fail there: unknown commands, recipes and flags, and data that is not there."""
    from jobs.cli import COMMANDS, nearest
    from jobs.run_commands import check_train

    if argv[0] not in COMMANDS:
        raise JobError(f"there is no command {argv[0]!r} to submit; did you mean {nearest(argv[0], COMMANDS)}?")
    for word in argv:
        refuse_secret(word)  # Ray shows a job's command to whoever may see the job
    if argv[0] != "train":
        return
    config = check_train(list(argv[1:]))
    if config is None:
        raise JobError("`train --help` needs no cluster; expected `train RECIPE ...`")
    from pipeline import preflight

    preflight.check(config)


def connect(spec: Spec) -> JobSubmissionClient:
    """A client of the cluster's job server."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray takes this variable for more than the address it is given; the one that was asked for must win.
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
            f"no Ray job server answers at {spec.address} ({first_line(error)}); expected a running cluster: "
            "start one with `ray start --head`, or give --address"
        ) from None


def jobs_table(spec: Spec) -> str:
    """The cluster's jobs, newest first."""
    from pipeline.report import table

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
    """One word: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    try:
        return str(connect(spec).get_job_status(job_id).value)
    except RuntimeError:
        raise JobError(f"there is no job {job_id!r} on {spec.address}; see `detr jobs list`") from None


def logs(spec: Spec, job_id: str) -> str:
    """All that the job has printed so far."""
    status(spec, job_id)
    return str(connect(spec).get_job_logs(job_id))


def follow_logs(spec: Spec, job_id: str, stream: TextIO) -> None:
    """Copy the job's log until it ends; raises `JobError` when it did not succeed."""
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
    """Interrupt the job, wait until it has left, and return how it ended."""
    if status(spec, job_id) in ("SUCCEEDED", "FAILED", "STOPPED"):
        return f"{job_id} had ended already"
    client = connect(spec)
    client.stop_job(job_id)
    until = time.monotonic() + wait_s
    while time.monotonic() < until:
        final = status(spec, job_id)
        if final in ("SUCCEEDED", "FAILED", "STOPPED"):
            return f"{job_id} {final.lower()}"
        time.sleep(1)
    raise JobError(f"job {job_id} did not end within {wait_s:.0f} s; see `detr jobs logs {job_id}`")
