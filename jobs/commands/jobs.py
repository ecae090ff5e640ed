"""Subcommands for jobs that were submitted: jobs list|status|logs|stop|resume."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import tyro

from jobs.errors import JobError
from jobs.parsing import Command, Flag, choose, parse

if TYPE_CHECKING:
    from jobs.clusters.entries import Cluster
    from jobs.engines import Engine, Job

_NARROWEST = 20


@dataclass(frozen=True)
class JobsOf:
    """List the jobs of a cluster, newest first."""

    cluster: str = "local"
    """Name of the cluster's entry; `detr clusters` lists them."""
    address: str | None = None
    """URL of another job server than the entry's; only for Ray clusters without a token."""


@dataclass(frozen=True)
class OneJob(JobsOf):
    """Print the state of a job (PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED), its reason, and the run that it trains."""

    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="JOB")] = tyro.MISSING
    """Id of the job, as printed by `detr submit` and `detr jobs list`."""


@dataclass(frozen=True)
class JobLogs(OneJob):
    """Print the output of a job; if its launcher has none any more, that which its run in MLflow keeps."""

    follow: Flag = False
    """Continue until the job ends."""


@dataclass(frozen=True)
class JobStop(OneJob):
    """Interrupt a job and wait until it has ended. A training run saves a checkpoint first."""


@dataclass(frozen=True)
class JobResume(OneJob):
    """Submit the command of an ended job again; a training continues the same run."""


def jobs(argv: list[str]) -> None:
    """Run `detr jobs list|status|logs|stop|resume`."""
    choose(
        argv,
        {
            "list": Command("List the jobs of a cluster", _list),
            "status": Command("Print the state of a job and the run that it trains", _status),
            "logs": Command("Print the output of a job", _logs),
            "stop": Command("Interrupt a job and wait until it has ended", _stop),
            "resume": Command("Submit the command of an ended job again", _resume),
        },
        "detr jobs",
    )


def _list(argv: list[str]) -> None:
    options = parse(JobsOf, argv, "detr jobs list")
    engine, cluster = _engine(options)
    print(jobs_table(engine.list(cluster), _width()))


def jobs_table(found: Sequence[Job], width: int) -> str:
    """Return a table of jobs that is at most `width` characters wide, if that is not 0: the last column is cut."""
    from pipeline.display.terminal import table

    rows = [
        (
            job.id,
            job.state,
            f"{datetime.fromtimestamp(job.started):%m-%d %H:%M}" if job.started else "-",
            job.run or "-",
            job.command if job.state in ("RUNNING", "SUCCEEDED") or not job.reason else job.reason,
        )
        for job in found
    ]
    header = ("job", "status", "started", "run", "command, or reason")
    if width:
        left = sum(max(len(row[column]) for row in [header, *rows]) + 2 for column in range(len(header) - 1))
        most = max(width - left, _NARROWEST)
        rows = [(*row[:-1], row[-1] if len(row[-1]) <= most else f"{row[-1][: most - 3]}...") for row in rows]
    return table(header, rows)


def _width() -> int:
    """Return the width of the terminal; 0 for a file, which takes any."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or "COLUMNS" in os.environ else 0


def _status(argv: list[str]) -> None:
    options = parse(OneJob, argv, "detr jobs status")
    engine, cluster = _engine(options)
    from jobs.runs_of_jobs import run_lines

    job = engine.status(cluster, options.id)
    print(job.state)
    lines = [("command", job.command)] if job.command else []
    if job.reason and job.state != "RUNNING":
        lines.append(("waits" if job.state == "PENDING" else "reason", job.reason))
    words = shlex.split(job.command) if job.command.startswith("detr ") else []
    if job.run or not words or words[1] in ("train", "sweep", "resume", "demo"):
        lines += run_lines(cluster, job)
    width = max((len(name) for name, _ in lines), default=0)
    for name, text in lines:
        print(f"{name.ljust(width)}  {text}")


def _logs(argv: list[str]) -> None:
    options = parse(JobLogs, argv, "detr jobs logs")
    engine, cluster = _engine(options)
    try:
        engine.logs(cluster, options.id, sys.stdout, follow=options.follow)
    except JobError as error:
        if "ended as" in str(error):
            raise
        from jobs.runs_of_jobs import kept_log

        kept = kept_log(cluster, options.id)
        if not kept:
            raise
        print(f"{error}; this is what its run keeps", file=sys.stderr)
        print(kept, end="")


def _stop(argv: list[str]) -> None:
    options = parse(JobStop, argv, "detr jobs stop")
    engine, cluster = _engine(options)
    print(engine.stop(cluster, options.id))


def _resume(argv: list[str]) -> None:
    options = parse(JobResume, argv, "detr jobs resume")
    engine, cluster = _engine(options)
    from jobs.engines.engine import ENDED
    from jobs.submit import submit

    job = engine.status(cluster, options.id)
    if job.state not in ENDED:
        raise JobError(f"job {job.id} is {job.state}; expected one that has ended: `detr jobs stop {job.id}` first")
    words = shlex.split(job.command) if job.command else _of_run(cluster, job)
    if words[:1] != ["detr"]:
        raise JobError(
            f"the launcher does not know the command of job {job.id}; expected a job of `detr submit`: submit it again"
        )
    print(f"submitted   {submit(cluster, words[1:], print)} to {cluster.name} ({cluster.launcher})")


def _of_run(cluster: Cluster, job: Job) -> list[str]:
    """Return the command that continues the run of a job whose launcher keeps no command; empty if there is no run."""
    from jobs.runs_of_jobs import command_of_run

    return command_of_run(cluster, job)


def _engine(options: JobsOf) -> tuple[Engine, Cluster]:
    """Return the engine and the entry that the options name."""
    from jobs.clusters import find_cluster
    from jobs.engines import engine_of
    from jobs.refusals import at_address

    cluster = find_cluster(options.cluster)
    if options.address:
        cluster = at_address(cluster, options.address)
    return engine_of(cluster), cluster
