"""Subcommands for runs: train, show, demo, resume, runs, sync, ui."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import tyro

from jobs.commands.models import show_version
from jobs.parsing import Flag, parse
from jobs.training import Start, fitted, known_config, parse_train, recipe_help, recipe_named, smoke
from pipeline.config import ClusterConfig, ComputeConfig, RunConfig, to_json
from pipeline.recipes import NOTES


@dataclass(frozen=True)
class Demo(Start):
    """Train a small model on built-in data, register it and evaluate it. Takes a few minutes on a laptop."""


def train(argv: list[str]) -> None:
    """Run `detr train RECIPE [--any.field value ...]`."""
    options = parse_train(argv, "detr train")
    if options is None:
        return
    config, run = options.config, options.run or ""
    if options.smoke:
        print("smoke: two steps of two images on one worker, random backbone weights, evaluation on two images")
        config, run = smoke(config), f"{run}-smoke" if run else ""

    def fit(known: RunConfig | None) -> RunConfig:
        config = fitted(options.config, argv, print, known)
        return smoke(config) if options.smoke else config

    if options.dry_run:
        from jobs.forecast import forecast_here

        config = fit(known_config(config, run))
        print(forecast_here(config, run, _warn, anywhere=bool(options.start.address)))
        return
    from pipeline.train import train as start_training

    launch = _launch(options.start)
    _print_outcome(start_training(config, launch, run=run, accept_change=options.accept_change, fit=fit))


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _launch(start: Start) -> Any:
    from pipeline.timeline import process_start
    from pipeline.train import Launch

    return Launch(address=start.address, verbose=start.verbose, began=process_start())


def _print_outcome(outcome: Any) -> None:
    from pipeline.display.tables import metrics_table
    from pipeline.tracking.pages.links import run_link

    print(f"\n{metrics_table(outcome.metrics)}\n")
    print(f"best        {outcome.best}")
    uri = f"models:/{outcome.model_name}/{outcome.version}{' (@best)' if outcome.is_best else ''}"
    print(f"registered  {uri if outcome.version else 'nothing, as track.register never asks'}")
    print(f"in MLflow   {run_link(outcome.experiment_id, outcome.run_id)}")


def show(argv: list[str]) -> None:
    """Run `detr show RECIPE [--any.field value ...]`, or `detr show MODEL`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(recipe_help("detr show"))
        return
    if argv[0].startswith("models:/"):
        show_version(argv)
        return
    config = parse(RunConfig, argv[1:], f"detr show {argv[0]}", default=recipe_named(argv[0]))
    if note := NOTES.get(config.recipe):
        _warn(note)
    if any(word.startswith("--data.train") for word in argv):
        config = fitted(config, argv, _warn)
    print(to_json(config).decode())


def demo(argv: list[str]) -> None:
    """Run `detr demo`."""
    start = parse(Demo, argv, "detr demo")
    from pipeline.demo import demo as run_demo

    run_demo(_launch(start))


class ClusterChanges(ClusterConfig):
    """Options of the cluster that the run continues with; those that are not given stay as they were."""

    def __post_init__(self) -> None:
        """Check nothing: only together with the run's own options is it known what fits."""


class ComputeChanges(ComputeConfig):
    """Options of the computation that the run continues with; those that are not given stay as they were."""


@dataclass(frozen=True)
class Resume:
    """Resume a run from its newest checkpoint, at exactly the next sample."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Id of the run, the first characters of the id, the run's name, or its location STORAGE/NAME.
    With models:/NAME@ALIAS, the run that this registered version came from is resumed."""
    start: Annotated[Start, tyro.conf.arg(name="")]
    epochs: int | None = None
    """Total number of epochs to train, at least as many as before. The default leaves it unchanged."""
    batch_size: int | None = None
    """Number of images per step from now on, over all workers; needs --accept-change."""
    data: str | None = None
    """Folder or URL of another training data set with the same categories; needs --accept-change."""
    accept_change: Flag = False
    """Resume even if the training data or the batch size differ from the checkpoint's.
    The run then continues at the same number of samples in the new order of samples."""
    cluster: ClusterChanges = field(default_factory=ClusterChanges)
    compute: ComputeChanges = field(default_factory=ComputeChanges)


def resume(argv: list[str]) -> None:
    """Run `detr resume RUN`."""
    options = parse(Resume, argv, "detr resume")
    from pipeline.driver.changes import ResumeOptions
    from pipeline.train import resume as resume_run

    changes = ResumeOptions(
        options.epochs,
        options.batch_size,
        options.data,
        options.accept_change,
        _given(argv, "cluster", options.cluster),
        _given(argv, "compute", options.compute),
    )
    _print_outcome(resume_run(options.run, changes, _launch(options.start)))


def _given(argv: list[str], section: str, options: object) -> dict[str, Any]:
    """Return the options of a section that flags set, by name."""
    words = [word.partition("=")[0].replace("-", "_") for word in argv if word.startswith(f"--{section}.")]
    names = [word.partition(".")[2] for word in words]
    known = [item.name for item in fields(options)]  # type: ignore[arg-type]
    return {name: getattr(options, name) for name in known if name in names or f"no_{name}" in names}


@dataclass(frozen=True)
class Runs:
    """List the newest runs, or show one run."""

    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    """Id of a run, the first characters of the id, or the run's name. The default lists the newest runs."""
    follow: Flag = False
    """Print the run's progress until it ends; only with RUN."""
    limit: int = 20
    """Maximum number of runs in the list."""


def runs(argv: list[str]) -> None:
    """Run `detr runs [RUN [--follow]]`."""
    options = parse(Runs, argv, "detr runs")
    from pipeline.display.tables import runs_table
    from pipeline.driver.dead_drivers import close_dead_runs
    from pipeline.tracking.mlflow_client import connect
    from pipeline.tracking.mlflow_runs import find_run, find_runs

    client = connect()
    if options.run is None:
        newest = find_runs(client, limit=options.limit)
        if close_dead_runs(client, newest, print):
            newest = find_runs(client, limit=options.limit)
        print(runs_table(newest))
        return
    run = find_run(client, options.run)
    if close_dead_runs(client, [run], print):
        run = find_run(client, options.run)
    print(runs_table([run]))
    if options.follow:
        from pipeline.display.follow import follow

        follow(client, run.info.run_id, sys.stderr)


@dataclass(frozen=True)
class Sync:
    """Send to MLflow what it has not taken of a run: its driver was killed, or ended while MLflow was away."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Id of the run, the first characters of the id, the run's name, or its location STORAGE/NAME."""


def sync(argv: list[str]) -> None:
    """Run `detr sync RUN`."""
    options = parse(Sync, argv, "detr sync")
    from pipeline.driver.launch import say
    from pipeline.driver.sync import sync as send

    send(options.run, say)


@dataclass(frozen=True)
class Ui:
    """Start the MLflow UI on the local store. With a tracking server, print its address instead."""

    port: int = 5000
    """Port that the UI listens on."""
    host: str = "127.0.0.1"
    """Address that the UI listens on. The default accepts connections from this machine only."""


def ui(argv: list[str]) -> None:
    """Run `detr ui`."""
    options = parse(Ui, argv, "detr ui")
    from pipeline.tracking.ui import serve_ui

    serve_ui(options.host, options.port)
