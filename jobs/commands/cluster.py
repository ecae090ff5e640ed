"""Subcommands that send jobs to clusters: clusters, submit."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from jobs.parsing import Flag, UsageError, parse
from jobs.plan import SUBMITTABLE

if TYPE_CHECKING:
    from jobs.plan import Plan


@dataclass(frozen=True)
class Submit:
    """Run a command on a cluster: `detr submit NAME [--dry-run] [--write FILE] -- COMMAND ...`.

    The command is checked on this machine before it is sent. A training gets a run name unless it has --run, so every
    retry of the launcher continues the same run.
    """

    cluster: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of an entry [clusters.NAME] in detr.toml or ~/.config/detr/clusters.toml; `detr clusters` lists them.
    `local` is the Ray cluster of this machine, with its Python and current folder."""
    dry_run: Flag = False
    """Print the plan and, for a training, a forecast of its time and cost; send nothing."""
    write: str | None = None
    """Write the file that describes the job to the launcher, such as a manifest or a script, print the commands that
    submit it, and send nothing. With --dry-run only the file is written, and nothing beside it. `-` prints the file
    instead, and nothing else."""
    address: str | None = None
    """URL of another job server than the entry's, http(s)://HOST:8265; only for Ray clusters without a token."""
    follow: Flag = False
    """Print the job's log until the job ends."""


def submit(argv: list[str]) -> None:
    """Run `detr submit NAME -- COMMAND ...`."""
    own, command = argv, []
    if "--" in argv:
        separator = argv.index("--")
        own, command = argv[:separator], argv[separator + 1 :]
    elif len(argv) > 1 and (word := next((word for word in argv[1:] if word in SUBMITTABLE), "")):
        raise UsageError(f"got {word!r} without -- before it; expected `detr submit {argv[0]} -- {word} ...`")
    options = parse(Submit, own, "detr submit")
    if not command:
        raise UsageError("nothing to run after --; expected `detr submit NAME -- train RECIPE ...`")
    from jobs.clusters import find_cluster
    from jobs.commands.requests import read_request
    from jobs.engines import engine_of
    from jobs.plan import describe
    from jobs.refusals import at_address
    from jobs.runs_of_jobs import experiments_link
    from jobs.submit import prepare, send

    cluster = find_cluster(options.cluster)
    if options.address:
        cluster = at_address(cluster, options.address)
    sends = not (options.write or options.dry_run)
    plan = prepare(cluster, command, _warn, read_request, ask=sends)
    if options.write:
        text = engine_of(cluster).render(plan)
        print(text, end="") if options.write == "-" else _write(plan, options.write, text, dry=options.dry_run)
    if options.dry_run:
        out = sys.stderr if options.write == "-" else sys.stdout
        print(describe(plan), file=out)
        if plan.config is not None:
            from jobs.forecast import forecast_on

            given = any(word == "--run" or word.startswith("--run=") for word in command)
            print(f"\n{forecast_on(cluster, plan.config, plan.run if given else '', _warn)}", file=out)
    if not sends:
        return
    job = send(plan)
    there = "" if cluster.name == "local" else f" --cluster {cluster.name}"
    print(f"submitted   {job} to {cluster.name} ({cluster.launcher})")
    if plan.run:
        print(f"run         {plan.run}")
    print(f"follow it   detr jobs logs {job}{there} --follow")
    print(f"stop it     detr jobs stop {job}{there}")
    if plan.config is not None and (link := experiments_link(cluster)):
        print(f"in MLflow   {link}")
    if options.follow:
        engine_of(cluster).logs(cluster, job, sys.stdout, follow=True)


def _write(plan: Plan, file: str, text: str, *, dry: bool) -> None:
    """Write the launcher's file, and print the commands that submit it; with `dry` write nothing beside it."""
    from jobs.engines import engine_of

    Path(file).write_text(text)
    if dry:
        print(f"written     {file}; without --dry-run also what it needs beside it, and the commands that submit it\n")
        return
    lines = engine_of(plan.cluster).by_hand(plan, file)
    for line in lines:
        print(f"submit it   {line}")


def _warn(text: str) -> None:
    print(text, file=sys.stderr)
