"""Subcommand `show-batch`: the global batch of one step of a run, as its model sees it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.parsing import UsageError, parse
from jobs.training import fitted, recipe_help, recipe_named
from pipeline.config import RunConfig


@dataclass(frozen=True)
class ShowBatch:
    """Draw the global batch of one step of a recipe: augmented, padded, with boxes, as the model sees it.

    It is the batch that a run with the same options trains in this step, to the last bit. No run is needed.
    """

    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    out: Path
    """File for the picture, as PNG."""
    step: int = 0
    """Number of the step, from 0."""


def show_batch(argv: list[str]) -> None:
    """Run `detr show-batch RECIPE --step N --out FILE`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(recipe_help("detr show-batch"))
        if not argv:
            raise UsageError("got no recipe; expected one of those above")
        return
    prog = f"detr show-batch {argv[0]}"
    options = parse(ShowBatch, argv[1:], prog, default=ShowBatch(recipe_named(argv[0]), tyro.MISSING))
    from pipeline.data.datasets import open_data
    from pipeline.data.loader import global_batch
    from pipeline.display.batches import BatchView
    from pipeline.display.terminal import table
    from pipeline.schedule import Schedule

    config = fitted(options.config, argv, print)
    train, _ = open_data(config.data)
    schedule = Schedule(config.optim, train.images, config.data.epoch_tail)
    if not 0 <= options.step < schedule.total_steps:
        raise UsageError(f"got --step {options.step}; expected a step of the run, 0 to {schedule.total_steps - 1}")
    view = BatchView(config.transform, [category.name for category in train.categories])
    workers, threads = config.cluster.workers, config.data.reader_threads
    with closing(global_batch(train, config, schedule, options.step, workers, threads)) as ranks:
        view.add_all(ranks)
    view.picture().save(options.out, format="PNG")
    rows = [[str(value) for value in row] for row in zip(*view.columns.values(), strict=True)]
    print(table(list(view.columns), rows))
    print(f"\nstep {options.step}, epoch {schedule.epoch_of(options.step)}: see {options.out}")
