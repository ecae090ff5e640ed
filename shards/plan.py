"""Which sample goes in which step, and on which rank: pure arithmetic, the same on every machine.

The images of an epoch come in the order of a hash of (seed, epoch, row). The *stream* is the concatenation of all
epochs, and ``shards.steps`` cuts it into steps; a rank takes a contiguous slice of the step. So every epoch holds each
image exactly once, nothing depends on the number of ranks, and the step number alone says where a resumed run goes on,
on any number of ranks.

splitmix64 (Steele, Lea and Flood 2014) because its values are fixed for ever; NumPy does not promise that for its
Generators. Ordering 118,287 images takes about 10 ms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.index import Ints
from shards.manifest import Manifest
from shards.shapes import pair_up, rough_keys
from shards.steps import START, EpochTail, Origin, Steps

# The order of the samples, for equal arguments; to be raised by whoever changes it.
PLAN_VERSION = 1
_MASK = (1 << 64) - 1
# What else is hashed beside samples. Kept for ever, as any other number would give another order.
_SHARDS, _STEPS = 1, 2
_SORTED_AT_ONCE = 1 << 15
# (rows int64 [n], epochs int64 [n]) -> heights and widths in pixels, int64 [n] each; see plan_epoch.
Sizes = Callable[[Ints, Ints], tuple[Ints, Ints]]


@dataclass(frozen=True)
class PlanConfig:
    """The order of the samples and how it is cut into steps: part of a run's identity, the same on every rank.

    Attributes:
        sort_window: global batches whose samples are sorted together by their sizes. 1 sorts inside each, which moves
            no sample to another step; more make the images of a step alike, so that ranks wait less for each other.
        shuffle_shards: 0 shuffles the whole epoch. N shows the shards in blocks of N, whose order and whose samples'
            order are new in each epoch: for data sets that do not fit into a node's cache.
        epoch_tail: straddle cuts the concatenation of the epochs, so every step is full; short ends each epoch with a
            step of what is left.
    """

    sort_window: int = 1
    shuffle_shards: int = 0
    epoch_tail: EpochTail = "straddle"

    def __post_init__(self) -> None:
        if self.sort_window < 1 or self.shuffle_shards < 0:
            raise ShardError(
                f"got sort_window {self.sort_window} and shuffle_shards {self.shuffle_shards}, expected at least 1 and 0"
            )
        if self.epoch_tail not in ("straddle", "short"):
            raise ShardError(f"got epoch_tail {self.epoch_tail!r}, expected straddle or short")


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's output for each state in ``values``: a fixed, well mixed bijection of 64-bit integers."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)  # in place: an epoch may have a hundred million
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def hashes(numbers: tuple[int, ...], values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of (*numbers, value) for each value, uint64 of the shape of ``values``, or [1] for one number."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = splitmix64(state ^ np.array([number & _MASK], np.uint64))
    return splitmix64(state ^ np.asarray(values).astype(np.uint64))


def epoch_order(seed: int, epoch: int, count: int) -> Ints:
    """The permutation of 0..count-1 in which epoch ``epoch`` shows the images, int64 [count]."""
    # A stable sort, so that equal hashes (improbable, not impossible) keep one order everywhere.
    return np.argsort(hashes((seed, epoch), np.arange(count)), kind="stable").astype(np.int64, copy=False)


def shard_blocks(seed: int, epoch: int, shards: int, per_block: int) -> Ints:
    """The block, from 0, in which each shard is shown in ``epoch`` where ``shuffle_shards`` is ``per_block``, int64.

    A loader then reads from the shards of one block at a time, or two at the seam, and may forget those before.
    """
    places = np.empty(shards, np.int64)
    places[np.argsort(hashes((seed, epoch, _SHARDS), np.arange(shards)), kind="stable")] = np.arange(shards)
    return places // per_block


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The steps that start inside one epoch.

    Attributes:
        epoch: the epoch, from 0.
        batch_size: samples of a full step, over all ranks.
        images: images of the data set.
        first_step: number of the plan's first step (global: counted from the start of the run).
        end_step: one past its last step. Equal to ``first_step`` where no step starts in the epoch.
        rows: int64, the rows of all its steps one after the other.
        epochs: int64, the epoch each of them belongs to (for the augmentation).
    """

    epoch: int
    batch_size: int
    images: int
    first_step: int
    end_step: int
    rows: Ints
    epochs: Ints

    def __len__(self) -> int:
        """The number of steps."""
        return self.end_step - self.first_step

    def samples(self, step: int) -> int:
        """Samples of a step over all ranks: ``batch_size``, or fewer where an epoch or the run ends in it."""
        start, stop = self._bounds(step)
        return stop - start

    def step(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[Ints, Ints]:
        """A rank's contiguous part of a step: (rows int64 [n], epochs int64 [n]).

        The parts of all ranks, in order, are the step for every ``world_size``; their sizes differ by at most one, and
        some are empty where the step has fewer samples than there are ranks. Raises ShardError for a step outside the
        plan or an impossible rank.
        """
        if not 0 <= rank < world_size:
            raise ShardError(f"got rank {rank} of {world_size}, expected 0 <= rank < world_size")
        start, stop = self._bounds(step)
        count = stop - start
        part = slice(start + rank * count // world_size, start + (rank + 1) * count // world_size)
        return self.rows[part], self.epochs[part]

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
    """Plan the steps that start inside ``epoch``.

    Args:
        manifest: the data set; only its number of images matters and, for ``shuffle_shards``, those of its shards.
        seed: any integer; the order is a function of (seed, epoch, row).
        epoch: from 0.
        batch_size: samples per step over all ranks.
        epochs: length of the run. Its very last step is cut there; without it that step would run on into the epoch
            after the last.
        sizes: what images are going to measure, for example after their augmentation. Where given, images of like shape
            are put together, so that a rank's slice pads less: inside each step, which moves no sample to another one,
            and before that over the steps of a window where ``config`` has larger ones.
        config: the options of the order and of the cut.
        origin: where the cut begins; see ``shards.steps``.

    Raises:
        ShardError: ``batch_size`` or ``epoch`` is out of range.
    """
    config = config or PlanConfig()
    images = manifest.images
    steps = Steps(images, batch_size, config.epoch_tail, origin)
    if epoch < 0 or (epochs is not None and epoch >= epochs):
        raise ShardError(f"got epoch {epoch}, expected 0 <= epoch < {'any' if epochs is None else epochs}")
    start_step, end_step = (max(steps.at(number * images), origin.step) for number in (epoch, epoch + 1))
    start, stop = steps.position(start_step), steps.position(end_step)
    if epochs is not None:
        start, stop = (min(position, epochs * images) for position in (start, stop))
    rows, sample_epochs = _stream(manifest, seed, start, stop, config.shuffle_shards)
    if sizes is not None:
        # Some windows at a time: what sorting a large epoch takes need not be in memory all at once.
        window = config.sort_window * batch_size
        block = window * max(1, _SORTED_AT_ONCE // window)
        for begin in range(0, len(rows), block):
            part = slice(begin, begin + block)
            first, key = start_step + begin // batch_size, (seed, epoch, _STEPS)
            order = _sorted(*sizes(rows[part], sample_epochs[part]), batch_size, config.sort_window, key, first)
            rows[part], sample_epochs[part] = rows[part][order], sample_epochs[part][order]
    return EpochPlan(epoch, batch_size, images, start_step, end_step, rows, sample_epochs)


def plan_evaluation(
    manifest: Manifest, *, batch_size: int, sizes: tuple[Ints, Ints] | None = None, limit: int = 0
) -> tuple[Ints, ...]:
    """Fixed batches of rows, each image in exactly one: whole batches go to ranks ``[rank::world_size]``.

    The batches do not depend on the number of ranks, so neither does anything computed from them.

    Args:
        manifest: the data set.
        batch_size: images of a full batch.
        sizes: heights and widths of all images as they are going to be evaluated. Where given, a batch holds only
            images of one size, so that nothing is padded; the largest come first, so that what does not fit into memory
            shows at once. Without them images are sorted by aspect ratio: after the resize to one shortest side that
            alone decides their shape, and images of like shape pad little. Ties go by row.
        limit: plan only the first so many images of that order, 0 for all.

    Raises:
        ShardError: ``batch_size`` is out of range.
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
    """Positions [start, stop) of the concatenated epochs: rows and their epochs."""
    images = manifest.images
    rows, epochs = np.empty(stop - start, np.int64), np.empty(stop - start, np.int64)
    for epoch in range(start // images, -(-stop // images)):
        low, high = max(start, epoch * images), min(stop, (epoch + 1) * images)
        order = (
            _block_order(manifest, seed, epoch, shuffle_shards) if shuffle_shards else epoch_order(seed, epoch, images)
        )
        rows[low - start : high - start] = order[low - epoch * images : high - epoch * images]
        epochs[low - start : high - start] = epoch
    return rows, epochs


def _block_order(manifest: Manifest, seed: int, epoch: int, per_block: int) -> Ints:
    """The order of an epoch whose shards come in blocks. Rows lie in the order of the shards."""
    blocks = shard_blocks(seed, epoch, len(manifest.shards), per_block)
    of_rows = np.repeat(blocks, [shard.samples for shard in manifest.shards])
    return np.lexsort((hashes((seed, epoch), np.arange(manifest.images)), of_rows)).astype(np.int64, copy=False)


def _sorted(heights: Ints, widths: Ints, batch_size: int, window: int, key: tuple[int, ...], first_step: int) -> Ints:
    """The order of the samples of whole windows of steps in which those of like shape are together.

    The steps of a window take consecutive parts of its sorted samples, in an order that is hashed again, so that small
    images do not come first; a step keeps its size. Then each step is arranged by itself.
    """
    places = np.arange(len(heights)) // batch_size
    # Stable sorts: ties keep the order of the stream.
    order = np.lexsort((rough_keys(heights, widths), places // window)).astype(np.int64)
    if window > 1:
        steps = np.arange(int(places[-1]) + 1)
        shuffled = np.lexsort((hashes(key, first_step + steps), steps // window))
        to_step = np.repeat(shuffled, np.bincount(places)[shuffled])
        order = order[np.argsort(to_step, kind="stable")]
    return order[pair_up(heights[order], widths[order], batch_size)]
