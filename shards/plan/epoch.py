"""Assign samples to steps and ranks: pure arithmetic, the same on every machine.

The images of an epoch are ordered by a hash of (seed, epoch, row). The *stream* is the concatenation of all epochs and
is cut into steps (see `Steps`); a rank takes a contiguous slice of the step. So every epoch holds each image exactly
once, nothing depends on the number of ranks, and the step number alone determines the position of a resumed run, on any
number of ranks.

The hash is splitmix64 (Steele, Lea and Flood 2014), because its values are fixed for ever; NumPy does not promise that
for its generators. Ordering 118,287 images takes about 10 ms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shards.arrays import Ints
from shards.config import PlanConfig
from shards.dataset.manifest import Manifest
from shards.errors import ShardError
from shards.hashing import hashes
from shards.plan.shape_order import pair_up, rough_keys
from shards.plan.steps import START, Origin, Steps, ceil_div

# Version of the order of the samples; increase it with every change that gives another order for equal arguments.
PLAN_VERSION = 1


# Hash keys for the order of shards and of steps. Never change them: other numbers would give another order.
_SHARDS, _STEPS = 1, 2
_SORTED_AT_ONCE = 1 << 15  # samples that are sorted by size together, which bounds the memory

# (rows int64 [n], epochs int64 [n]) -> heights and widths in pixels, int64 [n] each; see `plan_epoch`.
Sizes = Callable[[Ints, Ints], tuple[Ints, Ints]]


def epoch_order(seed: int, epoch: int, count: int) -> Ints:
    """Return the order of the images in `epoch`, a permutation of 0..count-1, int64 [count]."""
    # A stable sort, so that equal hashes (improbable, not impossible) have the same order everywhere.
    return np.argsort(hashes((seed, epoch), np.arange(count)), kind="stable").astype(np.int64, copy=False)


def shard_blocks(seed: int, epoch: int, shards: int, per_block: int) -> Ints:
    """Return the block, from 0, of each shard in `epoch` if `shuffle_shards` is `per_block`, int64 [shards].

    A loader then reads the shards of one block at a time, or of two between blocks, and may drop the earlier ones.
    """
    ranks = np.empty(shards, np.int64)
    ranks[np.argsort(hashes((seed, epoch, _SHARDS), np.arange(shards)), kind="stable")] = np.arange(shards)
    return ranks // per_block


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The steps that start inside one epoch.

    `epoch` counts from 0; `batch_size` is the number of samples of a full step over all ranks, `images` that of the
    data set. Steps `first_step` <= step < `end_step` are counted from the start of the run; both are equal when no step
    starts in the epoch. `rows` int64 [samples] are the rows of all the steps in order, `epochs` int64 [samples] the
    epoch of each for its augmentation.
    """

    epoch: int
    batch_size: int
    images: int
    first_step: int
    end_step: int
    rows: Ints
    epochs: Ints

    def __len__(self) -> int:
        """Return the number of steps."""
        return self.end_step - self.first_step

    def samples(self, step: int) -> int:
        """Return the samples of a step over all ranks: `batch_size`, or fewer if an epoch or the run ends in it."""
        start, stop = self._bounds(step)
        return stop - start

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Ints, Ints]:
        """Return a rank's contiguous slice of a step: (rows int64 [n], epochs int64 [n]).

        The slices of all ranks, in order, make up the step for every `world_size`; their sizes differ by at most one,
        and some are empty if the step has fewer samples than there are ranks. Raise `ShardError` for a step outside the
        plan or an impossible rank.
        """
        if not 0 <= rank < world_size:
            raise ShardError(f"got rank {rank} of {world_size}, expected 0 <= rank < world_size")
        start, stop = self._bounds(step)
        count = stop - start
        own = slice(start + rank * count // world_size, start + (rank + 1) * count // world_size)
        return self.rows[own], self.epochs[own]

    def _bounds(self, step: int) -> tuple[int, int]:
        if not self.first_step <= step < self.end_step:
            raise ShardError(
                f"got step {step}, expected a step of epoch {self.epoch}: {self.first_step} <= step < {self.end_step}"
            )
        start = (step - self.first_step) * self.batch_size
        return start, min(start + self.batch_size, len(self.rows))


def plan_epoch(
    manifest: Manifest,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    epochs: int | None = None,
    sizes: Sizes | None = None,
    config: PlanConfig | None = None,
    origin: Origin = START,
) -> EpochPlan:
    """Plan the steps that start inside `epoch`, counted from 0.

    Of `manifest` only the number of images matters and, for `shuffle_shards`, those of its shards. `seed` is any
    integer; the order is a function of (seed, epoch, row). `batch_size` is the number of samples per step over all
    ranks, `epochs` the length of the run: its last step is cut there, instead of taking samples of the epoch after the
    last. `origin` is the start of the cut.

    `sizes` returns the sizes that images are going to have, for example after augmentation. With it, images of similar
    shape are put together, so that a rank's slice pads less: inside each step, which moves no sample to another one,
    and before that over the steps of a window if `config.sort_window` is larger than 1.

    Raise `ShardError` when `batch_size` or `epoch` is out of range.
    """
    config = config or PlanConfig()
    images = manifest.images
    steps = Steps(images, batch_size, config.epoch_tail, origin)
    if epoch < 0 or (epochs is not None and epoch >= epochs):
        raise ShardError(f"got epoch {epoch}, expected 0 <= epoch < {'any' if epochs is None else epochs}")
    start_step = max(steps.at(epoch * images), origin.step)
    end_step = max(steps.at((epoch + 1) * images), origin.step)
    start, stop = steps.position(start_step), steps.position(end_step)
    if epochs is not None:
        start, stop = min(start, epochs * images), min(stop, epochs * images)
    rows, sample_epochs = _stream(manifest, seed, start, stop, config.shuffle_shards)
    if sizes is not None:
        # A few windows at a time, so that sorting a large epoch does not need memory for all of it at once.
        window = config.sort_window * batch_size
        length = window * max(1, _SORTED_AT_ONCE // window)
        key = (seed, epoch, _STEPS)
        for begin in range(0, len(rows), length):
            block = slice(begin, begin + length)
            heights, widths = sizes(rows[block], sample_epochs[block])
            first_step = start_step + begin // batch_size
            order = _sorted(heights, widths, batch_size, config.sort_window, key, first_step)
            rows[block], sample_epochs[block] = rows[block][order], sample_epochs[block][order]
    return EpochPlan(epoch, batch_size, images, start_step, end_step, rows, sample_epochs)


def plan_evaluation(
    manifest: Manifest, *, batch_size: int, sizes: tuple[Ints, Ints] | None = None, limit: int = 0
) -> tuple[Ints, ...]:
    """Return fixed batches of rows, each image in exactly one; whole batches go to ranks `[rank::world_size]`.

    The batches do not depend on the number of ranks, so neither does anything computed from them. `sizes` are heights
    and widths of all images at evaluation. With them, a batch holds images of one size only, so that nothing is padded,
    and the largest come first, so that a lack of memory shows at once. Without them, images are sorted by aspect ratio,
    which alone determines their shape after the resize to one shortest side, so that they pad little. Ties are sorted
    by row. `limit`: plan only the first `limit` images of that order; 0 plans all.

    Raise `ShardError` when `batch_size` is out of range.
    """
    if batch_size < 1:
        raise ShardError(f"got batch_size {batch_size}, expected at least 1 image per batch")
    if sizes is None:
        images = manifest.index().images
        order = np.argsort(images["width"] / images["height"], kind="stable").astype(np.int64)
        groups = [order[: limit or None]]
    else:
        heights, widths = sizes
        order = np.lexsort((widths, heights, -heights * widths)).astype(np.int64)[: limit or None]
        changes = (np.diff(heights[order]) != 0) | (np.diff(widths[order]) != 0)
        groups = np.split(order, np.flatnonzero(changes) + 1)
    return tuple(group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size))


def _stream(manifest: Manifest, seed: int, start: int, stop: int, shuffle_shards: int) -> tuple[Ints, Ints]:
    """Return rows and epochs of the positions [start, stop) of the concatenated epochs."""
    images = manifest.images
    rows, epochs = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
    for epoch in range(start // images, ceil_div(stop, images)):
        low, high = max(start, epoch * images), min(stop, (epoch + 1) * images)
        if shuffle_shards:
            order = _block_order(manifest, seed, epoch, shuffle_shards)
        else:
            order = epoch_order(seed, epoch, images)
        rows[low - start : high - start] = order[low - epoch * images : high - epoch * images]
        epochs[low - start : high - start] = epoch
    return rows, epochs


def _block_order(manifest: Manifest, seed: int, epoch: int, per_block: int) -> Ints:
    """Return the order of an epoch that is shuffled in blocks of shards; rows are in the order of the shards."""
    blocks = shard_blocks(seed, epoch, len(manifest.shards), per_block)
    of_rows = np.repeat(blocks, [shard.samples for shard in manifest.shards])
    return np.lexsort((hashes((seed, epoch), np.arange(manifest.images)), of_rows)).astype(np.int64, copy=False)


def _sorted(heights: Ints, widths: Ints, batch_size: int, window: int, key: tuple[int, ...], first_step: int) -> Ints:
    """Return the order of the samples of whole windows of steps that puts images of similar shape together.

    The steps of a window take consecutive slices of its sorted samples, in an order that is hashed again, so that small
    images do not come first; a step keeps its size. Then each step is arranged by itself.
    """
    step_of = np.arange(len(heights)) // batch_size
    # Stable sorts: ties keep the order of the stream.
    order = np.lexsort((rough_keys(heights, widths), step_of // window)).astype(np.int64)
    if window > 1:
        steps = np.arange(int(step_of[-1]) + 1)
        shuffled = np.lexsort((hashes(key, first_step + steps), steps // window))
        to_step = np.repeat(shuffled, np.bincount(step_of)[shuffled])
        order = order[np.argsort(to_step, kind="stable")]
    return order[pair_up(heights[order], widths[order], batch_size)]
