"""Canvases of a run: the shapes of its micro-batches, known from the plan before a byte is read.

CUDA graphs are captured for the most frequent ones (`compute.graphs`). The sizes of augmented images are a function of the
plan, so the share of passes that will find a graph is known before training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.config import RunConfig
from pipeline.data.loader import augmented_sizes, epoch_plan, pass_bounds, passes_per_step
from pipeline.schedule import Schedule
from shards.arrays import Ints
from shards.dataset.manifest import Manifest
from shards.plan.epoch import EpochPlan

_ENOUGH = 20_000  # passes over all ranks; their frequencies are those of the run within half a percent
_WANTED = 0.95  # share of passes
_MULTIPLES = (32, 64, 96, 128)


class Canvas(NamedTuple):
    """Shape of a micro-batch: images, height and width in pixels."""

    images: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Number of pixels of all images."""
        return self.images * self.height * self.width


@dataclass(frozen=True)
class ChosenCanvases:
    """Canvases to capture, the most frequent first, and the share of passes over them."""

    canvases: tuple[Canvas, ...]
    distinct: int
    """Number of canvases counted, the chosen ones included."""
    passes: int
    """Number of passes counted, over all ranks."""
    hit_rate: float
    largest_left: int
    """Pixels of the largest canvas that is not chosen, 0 if all are."""
    better_multiple: int = 0
    """Smallest larger `compute.canvas_multiple` with enough hits; 0 if the present one has, or none would."""

    def __str__(self) -> str:
        text = (
            f"CUDA graphs for {len(self.canvases)} of {self.distinct} canvases, expected for {self.hit_rate:.1%} of the "
            f"passes ({self.passes:,} counted in the plan)"
        )
        return f"{text}; --compute.canvas-multiple {self.better_multiple} has more" if self.better_multiple else text


def choose_canvases(manifest: Manifest, config: RunConfig, schedule: Schedule, workers: int) -> ChosenCanvases:
    """Return the at most `compute.max_graphs` most frequent canvases of a run with so many workers.

    At least 20,000 passes of all ranks are counted, in whole epochs from the first on, so that a resumed run chooses the
    same.
    """
    extents = _extents(manifest, config, schedule, workers)
    chosen = _chosen(extents, config.compute.canvas_multiple, config.compute.max_graphs)
    larger = (multiple for multiple in _MULTIPLES if multiple > config.compute.canvas_multiple)
    better = 0
    if chosen.hit_rate < _WANTED:
        better = next((m for m in larger if _chosen(extents, m, config.compute.max_graphs).hit_rate >= _WANTED), 0)
    return ChosenCanvases(**vars(chosen) | {"better_multiple": better})


def _chosen(extents: Ints, multiple: int, most: int) -> ChosenCanvases:
    rounded = extents.copy()
    rounded[:, 1:] = -(-rounded[:, 1:] // multiple) * multiple
    counts = Counter({Canvas(*map(int, shape)): int(count) for shape, count in zip(*_unique(rounded), strict=True)})
    # Ties by shape, so that the choice is the same everywhere.
    ordered = sorted(counts, key=lambda canvas: (-counts[canvas], canvas))
    canvases, left = tuple(ordered[:most]), ordered[most:]
    passes = counts.total()
    hits = sum(counts[canvas] for canvas in canvases)
    largest = max((canvas.pixels for canvas in left), default=0)
    return ChosenCanvases(canvases, len(counts), passes, hits / max(passes, 1), largest)


def _unique(rows: Ints) -> tuple[Ints, Ints]:
    values, counts = np.unique(rows, axis=0, return_counts=True)
    return values, counts


def _extents(manifest: Manifest, config: RunConfig, schedule: Schedule, workers: int) -> Ints:
    """Return images, largest height and largest width of the counted passes, int64 [passes, 3]."""
    found, passes = [np.zeros((0, 3), np.int64)], 0
    step = schedule.origin.step
    epoch = schedule.epoch_of(step)
    while step < schedule.total_steps and passes < _ENOUGH:
        plan = epoch_plan(manifest, config, schedule, epoch)
        end = min(plan.end_step, schedule.total_steps)
        found += _of_plan(manifest, config, plan, workers, max(step, plan.first_step), end)
        passes = sum(len(extents) for extents in found)
        step, epoch = max(step, end), epoch + 1
    return np.concatenate(found)


def _of_plan(
    manifest: Manifest, config: RunConfig, plan: EpochPlan, workers: int, begin: int, end: int
) -> Iterator[Ints]:
    heights, widths = augmented_sizes(manifest.index(), config.seed, config.transform)(plan.rows, plan.epochs)
    starts = (np.arange(begin, end) - plan.first_step) * plan.batch_size
    samples = np.minimum(starts + plan.batch_size, len(plan.rows)) - starts
    for count in np.unique(samples):  # one number, and one more if an epoch ends in a short step
        bounds = np.array(_bounds(int(count), workers, passes_per_step(config, workers)), np.int64).reshape(-1, 2)
        bounds = bounds[bounds[:, 0] < bounds[:, 1]]  # a pass without images is none
        slices = (starts[samples == count][:, None, None] + bounds).reshape(-1, 2)
        yield np.stack([slices[:, 1] - slices[:, 0], _maxima(heights, slices), _maxima(widths, slices)], 1)


def _maxima(sides: Ints, slices: Ints) -> Ints:
    """Return the maximum of each slice [start, stop) of `sides`; none is empty."""
    # `reduceat` reduces from each index to the next: every second of them is a slice, up to the appended end.
    return np.maximum.reduceat(np.append(sides, 0), slices.ravel())[::2].astype(np.int64)


def _bounds(samples: int, workers: int, passes: int) -> list[tuple[int, int]]:
    """Return start and stop in a step of `samples` of each rank's micro-batches, as the loader divides it."""
    found = []
    for rank in range(workers):
        start, stop = rank * samples // workers, (rank + 1) * samples // workers
        found += [(start + first, start + last) for first, last in pass_bounds(stop - start, passes)]
    return found
