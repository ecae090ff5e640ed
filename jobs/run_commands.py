"""Words about runs: train, show, demo, resume, runs, ui.

Imports of heavy packages stand inside the functions, after parsing, so that help is quick.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro

from jobs.command_line import UsageError, parse
from pipeline.config import RunConfig, to_json
from pipeline.recipes import NOTES, RECIPES


@dataclass(frozen=True)
class Start:
    """How a run starts; none of it changes the result."""

    address: str | None = None
    """A Ray cluster to train on (`auto`, HOST:6379); by default RAY_ADDRESS, else a local one is started."""
    verbose: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show what Ray, MLflow and the workers print."""


@dataclass(frozen=True)
class Train:
    """Train a recipe. Any of its fields can be overridden."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    start: Annotated[Start, tyro.conf.arg(name="")]
    smoke: bool = False
    """Two steps of the recipe, on two images each with random backbone weights: does everything fit together?"""


def train(argv: list[str]) -> None:
    """detr train RECIPE [--any.field value ...]."""
    options = _train_options(argv, "detr train")
    if options is None:
        return
    from pipeline.train import train as start_training

    config = smoke(options.config) if options.smoke else options.config
    if options.smoke:
        print("smoke: two steps of two images on one worker, random backbone weights, evaluation on two images")
    _print_outcome(start_training(config, _launch(options.start)))


def check_train(argv: list[str]) -> RunConfig | None:
    """The configuration that `detr train ARGV` would run, checked as far as it can be without data; None for help."""
    options = _train_options(argv, "detr train")
    return None if options is None else options.config


def _train_options(argv: list[str], prog: str) -> Train | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: {prog} RECIPE [--any.field value ...]   ({prog} RECIPE --help lists every field)\n\n{_recipe_list()}"
        )
        if not argv:
            raise UsageError("which recipe?")
        return None
    recipe = recipe_named(argv[0])
    return parse(Train, argv[1:], f"{prog} {argv[0]}", default=Train(recipe, Start()))


def recipe_named(name: str) -> RunConfig:
    """The recipe; an unknown name is refused with the nearest that exists."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, 1, 0.0)
        raise UsageError(f"there is no recipe {name!r}; did you mean {close[0]}? Expected one of: {', '.join(RECIPES)}")
    return RECIPES[name]


def smoke(config: RunConfig) -> RunConfig:
    """Two steps of a recipe that fit on a laptop: everything as it is but the batch, the workers and the weights.

    Where a recipe asks for GPUs, one is used if there is one.
    """
    gpu = "auto" if config.cluster.gpu == "yes" else config.cluster.gpu
    return replace(
        config,
        model=replace(config.model, backbone_weights="random"),
        optim=replace(config.optim, batch_size=2, max_steps=2),
        evaluate=replace(config.evaluate, limit=2, pictures=1),
        cluster=replace(config.cluster, workers=1, min_workers=0, cpus_per_worker=2, max_failures=0, gpu=gpu),
        track=replace(
            config.track, run_name=f"{config.run_name}-smoke", register_as=f"{config.model_name}-smoke", log_every=1
        ),
    )


def _recipe_list() -> str:
    width = max(map(len, RECIPES))
    return "recipes\n" + "\n".join(
        f"  {name.ljust(width)}  {config.model.backbone}{' DC5' if config.model.dilation else ''}, {config.optim.epochs} epochs, "
        f"batch {config.optim.batch_size}, {config.cluster.workers} workers"
        for name, config in RECIPES.items()
    )


def _launch(start: Start) -> Any:
    from pipeline.train import Launch

    return Launch(address=start.address, verbose=start.verbose)


def _print_outcome(outcome: Any) -> None:
    from pipeline.report import metrics_table

    print(f"\n{metrics_table(outcome.metrics)}\n")
    print(f"best        {outcome.best}")
    print(f"registered  models:/{outcome.model_name}/{outcome.version}{' (@best)' if outcome.is_best else ''}")
    print("in MLflow   detr ui")


def show(argv: list[str]) -> None:
    """detr show RECIPE."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: detr show RECIPE [--any.field value ...]\n\n{_recipe_list()}")
        return
    config = parse(RunConfig, argv[1:], f"detr show {argv[0]}", default=recipe_named(argv[0]))
    if note := NOTES.get(config.recipe):
        print(note, file=sys.stderr)
    print(to_json(config).decode())


def demo(argv: list[str]) -> None:
    """detr demo."""
    start = parse(Start, argv, "detr demo")
    from pipeline.demo import demo as run_demo

    run_demo(_launch(start))


@dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint, at the exact next sample."""

    run: tyro.conf.Positional[str]
    """The run's id, the start of it, or its name; or models:/NAME@ALIAS for the run a version came from."""
    start: Annotated[Start, tyro.conf.arg(name="")]
    epochs: int | None = None
    """Train to this many epochs instead of those it was started with."""
    batch_size: int | None = None
    """Take so many images per step from here on; needs --accept-change."""
    data: str | None = None
    """Folder or URL of other training shards, of the same categories; needs --accept-change."""
    accept_change: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on although the training data or the batch size are not those of the checkpoint: at the same number of samples,
    in the stream as it now is."""


def resume(argv: list[str]) -> None:
    """detr resume RUN."""
    options = parse(Resume, argv, "detr resume")
    from pipeline.identity import Changes
    from pipeline.train import resume as go_on

    changes = Changes(options.epochs, options.batch_size, options.data, options.accept_change)
    _print_outcome(go_on(options.run, changes, _launch(options.start)))


@dataclass(frozen=True)
class Runs:
    """List the newest runs, or show one."""

    run: tyro.conf.Positional[str | None] = None
    """A run's id, the start of it, or its name."""
    follow: bool = False
    """Watch it until it ends."""
    limit: int = 20


def runs(argv: list[str]) -> None:
    """detr runs [RUN [--follow]]."""
    options = parse(Runs, argv, "detr runs")
    from pipeline.mlflow_store import connect, find_run, find_runs
    from pipeline.report import runs_table

    client = connect()
    if options.run is None:
        print(runs_table(find_runs(client, limit=options.limit)))
        return
    run = find_run(client, options.run)
    print(runs_table([run]))
    if options.follow:
        from pipeline.follow import follow

        follow(client, run.info.run_id, sys.stderr)


@dataclass(frozen=True)
class Ui:
    """Open the MLflow UI on the local store (on loopback), or say where the tracking server is."""

    port: int = 5000
    host: str = "127.0.0.1"


def ui(argv: list[str]) -> None:
    """detr ui."""
    options = parse(Ui, argv, "detr ui")
    from pipeline.ui import serve_ui

    serve_ui(options.host, options.port)
