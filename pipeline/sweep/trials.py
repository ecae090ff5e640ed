"""Trials of a sweep, from flags with several values: every combination is a run of its own. Pure functions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.errors import RunConfigError

_LONGEST = 128  # of a run's name
_MOST = 1000


@dataclass(frozen=True)
class Trial:
    """A run of a sweep."""

    name: str
    """Name of the run."""
    options: tuple[str, ...]
    """Words of its command line after the recipe."""
    values: Mapping[str, str] = field(default_factory=dict)
    """The options in which trials differ, for tables and tags."""
    published: Mapping[str, float] = field(default_factory=dict)
    """Figures of a paper for this trial, by metric."""


def combinations(sweep: str, words: Sequence[str]) -> list[Trial]:
    """Return a trial for each combination of the flags' values, which commas divide: `--optim.lr 1e-4,2e-4 --seed 1,2`.

    Other words go to every trial. Raise `RunConfigError` for an empty value.
    """
    common, grid = _divided(words)
    names = [name for name, _ in grid]
    count = 1
    for _, values in grid:
        count *= len(values)
    if count > _MOST:
        raise RunConfigError(f"the sweep has {count:,} trials; expected {_MOST:,} or fewer: give fewer values")
    trials: list[Trial] = []
    for combination in itertools.product(*(values for _, values in grid)):
        chosen = dict(zip(names, combination, strict=True))
        flags = [word for name, value in chosen.items() for word in (f"--{name}", value)]
        trials.append(Trial(_run_name(sweep, chosen, len(trials)), (*common, *flags), chosen))
    return trials


def _divided(words: Sequence[str]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Return the words that all trials have, and the flags with several values."""
    common: list[str] = []
    grid: list[tuple[str, list[str]]] = []
    at = 0
    while at < len(words):
        word = words[at]
        flag, equals, value = word.partition("=")
        if not equals and at + 1 < len(words):
            value = words[at + 1]
        taken = 1 if equals else 2
        if word.startswith("--") and "," in value and not value.startswith("--"):
            values = value.split(",")
            if "" in values or len(set(values)) < len(values):
                raise RunConfigError(f"{flag} is {value!r}; expected different values with a comma between two")
            grid.append((flag.removeprefix("--").replace("_", "-"), values))
            at += taken
        else:
            common.append(word)
            at += 1
    return common, grid


def _run_name(sweep: str, chosen: Mapping[str, str], number: int) -> str:
    """Return a name that says the values, with the last word of each option where that is enough."""
    short = [name.rpartition(".")[2] for name in chosen]
    keys = [last if short.count(last) == 1 else name for last, name in zip(short, chosen, strict=True)]
    pieces = [f"{key}={_plain(value)}" for key, value in zip(keys, chosen.values(), strict=True)]
    name = "-".join([sweep, *pieces]) if pieces else f"{sweep}-only"
    return name if len(name) <= _LONGEST else f"{sweep}-{number:03d}"


def _plain(value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+=-]+", "-", value).strip("-") or "none"


def check_distinct(trials: Sequence[Trial]) -> None:
    """Raise `RunConfigError` if two trials would have the same name."""
    names = [trial.name for trial in trials]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise RunConfigError(
            f"two trials of the sweep are named {twice}; expected values that are also different as names"
        )
