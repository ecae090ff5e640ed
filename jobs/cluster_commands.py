"""Words about clusters: submit, jobs list|status|logs|stop."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import tyro

from jobs.command_line import UsageError, choose, parse


@dataclass(frozen=True)
class Submit:
    """Run `detr COMMAND ...` on a Ray cluster: `detr submit SPEC [--address URL] -- COMMAND ...`."""

    spec: tyro.conf.Positional[str]
    """Where and with what it runs; `local` is the cluster at the given address."""
    address: str | None = None
    """Of the cluster's job server; by default the spec's, or RAY_API_SERVER_ADDRESS."""
    follow: bool = False
    """Show the job's log until it ends."""


def submit(argv: list[str]) -> None:
    """detr submit SPEC -- COMMAND ..."""
    mine, _, command = (
        (argv[: argv.index("--")], "--", argv[argv.index("--") + 1 :]) if "--" in argv else (argv, "", [])
    )
    options = parse(Submit, mine, "detr submit")
    if not command:
        raise UsageError("nothing to run; expected `detr submit SPEC -- train RECIPE ...`")
    from jobs.submit import follow_logs, spec_named
    from jobs.submit import submit as send

    spec = spec_named(options.spec, options.address)
    job_id = send(spec, command)
    print(
        f"submitted {job_id} to {spec.address}\nfollow it   detr jobs logs {job_id} --follow\nstop it     detr jobs stop {job_id}"
    )
    if options.follow:
        follow_logs(spec, job_id, sys.stdout)


@dataclass(frozen=True)
class Cluster:
    """Which cluster's jobs."""

    address: str | None = None
    """Of the cluster's job server; by default RAY_API_SERVER_ADDRESS, else this machine's."""


@dataclass(frozen=True)
class Job(Cluster):
    """A job on a cluster."""

    id: tyro.conf.Positional[str] = tyro.MISSING
    """The job's id, as `detr submit` printed it."""


@dataclass(frozen=True)
class JobLogs(Job):
    """What a job has printed."""

    follow: bool = False
    """Go on until it ends."""


def jobs(argv: list[str]) -> None:
    """detr jobs list|status|logs|stop."""
    choose(argv, {"list": _jobs_list, "status": _jobs_status, "logs": _jobs_logs, "stop": _jobs_stop}, "detr jobs")


def _jobs_list(argv: list[str]) -> None:
    options = parse(Cluster, argv, "detr jobs list")
    from jobs.submit import jobs_table, spec_named

    print(jobs_table(spec_named("local", options.address)))


def _jobs_status(argv: list[str]) -> None:
    options = parse(Job, argv, "detr jobs status")
    from jobs.submit import spec_named, status

    print(status(spec_named("local", options.address), options.id))


def _jobs_logs(argv: list[str]) -> None:
    options = parse(JobLogs, argv, "detr jobs logs")
    from jobs.submit import follow_logs, logs, spec_named

    spec = spec_named("local", options.address)
    if options.follow:
        follow_logs(spec, options.id, sys.stdout)
    else:
        print(logs(spec, options.id), end="")


def _jobs_stop(argv: list[str]) -> None:
    options = parse(Job, argv, "detr jobs stop")
    from jobs.submit import spec_named, stop

    print(stop(spec_named("local", options.address), options.id))
