"""The command line of a training, `train RECIPE [--any.field value ...]`: parsed here, run by `jobs.commands.runs`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from jobs.parsing import Flag, UsageError, parse
from pipeline.config import RunConfig
from pipeline.recipes import RECIPES, SMALL


@dataclass(frozen=True)
class Start:
    """Options of the driver, which do not change the result of a run."""

    address: str | None = None
    """Address of the Ray cluster to train on, `auto` or HOST:6379.
    The default is RAY_ADDRESS; if that is not set, Ray is started on this machine."""
    verbose: Flag = False
    """Show the output of Ray, MLflow and the workers."""


@dataclass(frozen=True)
class Train:
    """Train a recipe; each of its fields can be changed by a flag."""

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    start: Annotated[Start, tyro.conf.arg(name="")]
    run: str | None = None
    """Name of the run. The first command with it starts the run, the same command continues it from its newest checkpoint,
    on any machine that sees --storage, and answers at once when the run has ended. The default starts a new run each time."""
    accept_change: Flag = False
    """Continue --run even if epochs, batch size, data or other options that make it another run differ from before."""
    dry_run: Flag = False
    """Start nothing, and print the steps, checkpoints, hours and GPU-hours that the training would take."""
    smoke: Flag = False
    """Only test that the recipe runs: two steps of two images on one worker, with random backbone weights."""


def parse_train(argv: list[str], prog: str) -> Train | None:
    """Return the options of `train ARGV`; None after printing the help that `argv` asks for."""
    if not argv or argv[0] in ("-h", "--help"):
        print(recipe_help(prog))
        if not argv:
            raise UsageError("got no recipe; expected one of those above")
        return None
    recipe = recipe_named(argv[0])
    options = parse(Train, argv[1:], f"{prog} {argv[0]}", default=Train(recipe, Start()))
    if options.run is not None:
        from pipeline.driver.record import check_name

        check_name(options.run)
        if options.config.track.run_name not in ("", recipe.track.run_name, options.run):
            raise UsageError(f"got --run {options.run} and --track.run-name; expected one of them: they name the same")
    return options


def recipe_named(name: str) -> RunConfig:
    """Return the recipe of this name; raise `UsageError` with the most similar known name for an unknown one."""
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, 1, 0.0)
        raise UsageError(f"there is no recipe {name!r}; did you mean {close[0]}? Expected one of: {', '.join(RECIPES)}")
    return RECIPES[name]


def fitted(
    config: RunConfig, argv: Sequence[str], say: Callable[[str], None], known: RunConfig | None = None
) -> RunConfig:
    """Return the configuration that `argv`, a recipe and its flags, means with its data, and `say` what the data chose.

    Only the recipe `small` chooses anything, and only for a new run: `known` is the configuration of the run that the
    command continues, which keeps what the flags do not give. Raise `ShardError` if the training data cannot be read.
    """
    if argv[0] != SMALL.recipe:
        return config
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv[1:] if word.startswith("--")}
    given |= {name.replace(".no_", ".") for name in given}
    if known is not None:
        from pipeline.driver.changes import kept

        return kept(known, config, given)
    from pipeline.data.small import fit_small
    from shards.dataset.manifest import load_manifest

    fit = fit_small(config, load_manifest(config.data.train), given)
    for reason in fit.reasons:
        say(reason)
    return fit.config


def known_config(config: RunConfig, run: str) -> RunConfig | None:
    """Return the configuration of the run that a command with `--run` continues, if `fitted` asks for it; else None."""
    if config.recipe != SMALL.recipe or not run:
        return None
    from pipeline.train import known_config as find

    return find(config, run)


def smoke(config: RunConfig) -> RunConfig:
    """Return the recipe shrunk to two steps on a laptop: small batch, one worker, random backbone weights, no version.

    A recipe that requires GPUs uses one if there is one.
    """
    gpu = "auto" if config.cluster.gpu == "yes" else config.cluster.gpu
    return replace(
        config,
        model=replace(config.model, backbone_weights="random"),
        optim=replace(config.optim, batch_size=2, max_steps=2),
        evaluate=replace(config.evaluate, limit=2, pictures=1),
        cluster=replace(config.cluster, workers=1, min_workers=0, cpus_per_worker=2, max_failures=0, gpu=gpu),
        track=replace(config.track, run_name=f"{config.run_name}-smoke", register="never", log_every=1),
    )


def recipe_help(prog: str) -> str:
    """Return the list of recipes."""
    width = max(map(len, RECIPES))
    lines = [f"usage: {prog} RECIPE [--any.field value ...]   (`{prog} RECIPE --help` lists all fields)", "", "recipes"]
    for name, config in RECIPES.items():
        backbone = f"{config.model.backbone} DC5" if config.model.dilation else config.model.backbone
        workers = "1 worker" if config.cluster.workers == 1 else f"{config.cluster.workers} workers"
        lines.append(
            f"  {name.ljust(width)}  {backbone}, {config.optim.epochs} epochs, batch {config.optim.batch_size}, {workers}"
        )
    return "\n".join(lines)
