"""Subcommand for sweeps: many runs that differ in a few options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

from jobs.nearest import nearest
from jobs.parsing import Flag, UsageError, parse
from jobs.training import fitted, known_config, parse_train, recipe_named
from pipeline.config import RunConfig
from pipeline.recipes import RECIPES
from pipeline.sweep.trials import Trial, combinations

_USAGE = "expected `detr sweep NAME RECIPE --optim.lr 1e-4,2e-4 --seed 1,2`"


@dataclass(frozen=True)
class Sweep:
    """Train a recipe with every combination of some options: `detr sweep NAME RECIPE --optim.lr 1e-4,2e-4 --seed 1,2`.

    Each trial is a run named NAME-OPTION=VALUE, which `detr train` and `detr resume` continue. The same command continues
    the sweep. Instead of RECIPE: a sweep of this package (--list) or a file NAME.toml.
    """

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Name of the sweep, with which the names of its runs begin."""
    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Recipe, sweep of this package or file.toml; then any options of `detr train`, those to vary with commas."""
    metric: str = "val/AP"
    """Metric in MLflow that trials are compared by."""
    mode: Literal["max", "min"] = "max"
    """Direction in which the metric is better."""
    early_stop: Literal["none", "asha"] = "none"
    """Rule that ends trials early.
    asha: at epochs grace, grace x reduction, ..., a trial ends unless it is among the best 1 / reduction so far.
    Such a trial has saved, and its own command (`detr train ... --run`) continues it as if it had never ended."""
    grace: int = 1
    """Number of epochs that every trial gets."""
    reduction: float = 3.0
    """Factor between the epochs at which trials end early, above 1."""
    parallel: int = 0
    """Number of trials at a time. 0: as many as the cluster can run."""
    dry_run: Flag = False
    """Start nothing, and print the trials and the time that they would take."""
    address: str | None = None
    """Address of the Ray cluster, `auto` or HOST:6379.
    The default is RAY_ADDRESS; if that is not set, Ray is started on this machine."""
    verbose: Flag = False
    """Show the output of Ray."""


def sweep(argv: list[str]) -> None:
    """Run `detr sweep NAME RECIPE ...`, or print the sweeps of this package."""
    if argv and argv[0] in ("--list", "--show"):
        _show(argv[1:])
        return
    own, words = divided(argv)
    options = parse(Sweep, own, "detr sweep")
    recipe, trials = trials_of(options.name, options.recipe, words)
    configs = [_fitted(recipe, trial) for trial in trials]
    _check(options, configs)
    import os

    address = options.address or os.environ.get("RAY_ADDRESS")
    if options.dry_run:
        from jobs.forecast import forecast_sweep

        runs = {trial.name: config for trial, config in zip(trials, configs, strict=True)}
        print(forecast_sweep(runs, _say, anywhere=bool(address)))
        return

    from pipeline.sweep.sweep import SweepPlan, run_sweep
    from pipeline.sweep.tuning import Tuning

    tuning = Tuning(
        options.metric, options.mode, options.early_stop, options.grace, options.reduction, options.parallel
    )
    plan = SweepPlan(options.name, recipe, trials, configs, tuning, address, options.verbose)
    print(f"\n{run_sweep(plan, _say)}")


def divided(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words of the sweep itself, and those for its trials."""
    known = {f"--{field.name.replace('_', '-')}" for field in fields(Sweep)}
    positional = list(argv[:2]) if len(argv) > 1 and not argv[1].startswith("-") else list(argv[:1])
    own: list[str] = positional
    words: list[str] = []
    at = len(positional)
    while at < len(argv):
        flag, equals, _ = argv[at].partition("=")
        flag = flag.replace("_", "-")
        takes = 1 if equals or flag in ("--verbose", "--dry-run", "--help", "-h") else 2
        (own if flag in (*known, "--help", "-h") else words).extend(argv[at : at + (takes if flag in known else 1)])
        at += takes if flag in known else 1
    return own, words


def trials_of(name: str, recipe: str, words: Sequence[str]) -> tuple[str, list[Trial]]:
    """Return the recipe and the trials of a sweep; words after a file's name go to all of its trials."""
    if recipe in RECIPES:
        return recipe, combinations(name, words)
    from pipeline.sweep.sweep_file import find_sweep_file, shipped

    found = find_sweep_file(recipe)
    if found is None:
        known = [*RECIPES, *shipped()]
        raise UsageError(f"there is no recipe or sweep {recipe!r}; did you mean {nearest(recipe, known)}? {_USAGE}")
    if any("," in word for word in words):
        raise UsageError(f"{recipe} has its own trials; expected options without several values")
    recipe_named(found.recipe)
    return found.recipe, [
        Trial(trial.name, (*trial.options, *words), trial.values, trial.published) for trial in found.trials_of(name)
    ]


def config_of(recipe: str, trial: Trial) -> RunConfig:
    options = parse_train([recipe, *trial.options, "--run", trial.name], "detr train")
    if options is None or options.dry_run or options.smoke:
        raise UsageError(f"got an option that starts no training; {_USAGE}")
    return options.config


def _fitted(recipe: str, trial: Trial) -> RunConfig:
    config = config_of(recipe, trial)
    return fitted(config, (recipe, *trial.options), lambda reason: None, known_config(config, trial.name))


def _check(options: Sweep, configs: Sequence[RunConfig]) -> None:
    from pipeline.display.tables import METRIC_MEANINGS

    family, _, metric = options.metric.partition("/")
    if not metric or (family == "val" and metric.removeprefix("mask_") not in METRIC_MEANINGS):
        known = [f"val/{name}" for name in METRIC_MEANINGS]
        raise UsageError(f"--metric is {options.metric!r}; did you mean {nearest(options.metric, known)}?")
    if options.reduction <= 1 or options.grace < 1 or options.parallel < 0:
        raise UsageError("expected --reduction above 1, --grace of 1 or more, --parallel of 0 or more")
    if len({(config.storage, config.track.experiment) for config in configs}) > 1:
        raise UsageError("the trials differ in storage or experiment; expected the same for all")
    if options.early_stop != "none" and family == "val" and configs[0].evaluate.every > options.grace:
        print(f"evaluations are {configs[0].evaluate.every} epochs apart, so no trial ends before the first")


def _show(words: Sequence[str]) -> None:
    """Print the sweeps of this package, or one of them."""
    from pipeline.sweep.results import file_table
    from pipeline.sweep.sweep_file import find_sweep_file, shipped

    if words:
        found = find_sweep_file(words[0])
        if found is None:
            raise UsageError(f"there is no sweep {words[0]!r}; expected one of: {', '.join(shipped())}")
        print(file_table(found))
        return
    print("\n\n".join(f"{name}\n{file_table(found)}" for name, found in shipped().items()))


def _say(text: str) -> None:
    print(text, flush=True)
