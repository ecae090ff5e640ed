"""Subcommands that run jobs on a Ray cluster: submit, jobs list|status|logs|stop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from jobs.parsing import Command, Flag, UsageError, choose, parse


@dataclass(frozen=True)
class Submit:
    """Run a command on a Ray cluster: `detr submit SPEC [--address URL] -- COMMAND ...`.

    The command is checked on this machine before it is sent.
    """

    spec: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SPEC")]
    """Name of an entry in jobs/spec.py. `local` uses this machine's Python and current folder."""
    address: str | None = None
    """URL of the cluster's job server, http(s)://HOST:8265.
    The default is the spec's own address: for `local`, RAY_API_SERVER_ADDRESS or else this machine."""
    follow: Flag = False
    """Print the job's log until the job ends."""


def submit(argv: list[str], check: Callable[[Sequence[str]], None]) -> None:
    """Run `detr submit SPEC -- COMMAND ...`; `check` raises for a command that would fail on the cluster."""
    own, command = argv, []
    if "--" in argv:
        separator = argv.index("--")
        own, command = argv[:separator], argv[separator + 1 :]
    options = parse(Submit, own, "detr submit")
    if not command:
        raise UsageError("nothing to run; expected `detr submit SPEC -- train RECIPE ...`")
    from jobs.submit import follow_logs, spec_named
    from jobs.submit import submit as send

    spec = spec_named(options.spec, options.address)
    check(command)
    job_id = send(spec, command)
    print(f"submitted {job_id} to {spec.address}")
    print(f"follow it   detr jobs logs {job_id} --follow")
    print(f"stop it     detr jobs stop {job_id}")
    if options.follow:
        follow_logs(spec, job_id, sys.stdout)


@dataclass(frozen=True)
class Cluster:
    """List the jobs of a cluster, newest first."""

    address: str | None = None
    """URL of the cluster's job server, http(s)://HOST:8265.
    The default is RAY_API_SERVER_ADDRESS, or this machine if it is not set."""


@dataclass(frozen=True)
class Job(Cluster):
    """Print the status of a job: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""

    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JOB")] = tyro.MISSING
    """Id of the job, as printed by `detr submit` and `detr jobs list`."""


@dataclass(frozen=True)
class JobLogs(Job):
    """Print the output of a job."""

    follow: Flag = False
    """Continue until the job ends."""


@dataclass(frozen=True)
class JobStop(Job):
    """Interrupt a job and wait until it has ended. A training run saves a checkpoint first."""


def jobs(argv: list[str]) -> None:
    """Run `detr jobs list|status|logs|stop`."""
    choose(
        argv,
        {
            "list": Command("List the jobs of a cluster", _jobs_list),
            "status": Command("Print the status of a job", _jobs_status),
            "logs": Command("Print the output of a job", _jobs_logs),
            "stop": Command("Interrupt a job and wait until it has ended", _jobs_stop),
        },
        "detr jobs",
    )


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
    options = parse(JobStop, argv, "detr jobs stop")
    from jobs.submit import spec_named, stop

    print(stop(spec_named("local", options.address), options.id))
