"""Which sample goes in which step, and on which rank: pure arithmetic, the same on every machine.

The images of an epoch come in the order of a hash of (seed, epoch, row). The *stream* is the concatenation of all
epochs, and step t takes its positions [t * batch_size, (t + 1) * batch_size); a rank takes a contiguous slice of the
step. So every epoch holds each image exactly once, nothing depends on the number of ranks, and the step number alone
says where a resumed run goes on, on any number of ranks. The price is that a step may straddle two epochs.

splitmix64 (Steele, Lea and Flood 2014) because its values are fixed for ever; NumPy does not promise that for its
Generators. Ordering 118,287 images takes about 10 ms.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.manifest import Ints, Manifest

_MASK = (1 << 64) - 1
# (rows int64 [n], epochs int64 [n]) -> sort keys [n]; see plan_epoch.
SortKeys = Callable[[Ints, Ints], npt.NDArray[np.generic]]


def splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's output for each state in ``values``: a fixed, well mixed bijection of 64-bit integers."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)  # wraps around, as it should
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def hashes(numbers: tuple[int, ...], values: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of (*numbers, value) for each value, uint64 of the shape of ``values``, or [1] for one number."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = splitmix64(state ^ np.array([number & _MASK], np.uint64))
    return splitmix64(state ^ np.asarray(values).astype(np.uint64))


def epoch_order(seed: int, epoch: int, count: int) -> Ints:
    """The permutation of 0..count-1 in which epoch ``epoch`` shows the images, int64 [count]."""
    # A stable sort, so that equal hashes (improbable, not impossible) keep one order everywhere.
    return np.argsort(hashes((seed, epoch), np.arange(count)), kind="stable").astype(np.int64)


def first_step(epoch: int, images: int, batch_size: int) -> int:
    """The first step that starts inside ``epoch`` or later: ceil(epoch * images / batch_size).

    ``first_step(epochs, ...)`` is also the number of steps of a run of that many epochs.
    """
    return -(-epoch * images // batch_size)


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
        """Samples of a step over all ranks: ``batch_size``, or fewer in the very last step of a run."""
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
    sort_keys: SortKeys | None = None,
) -> EpochPlan:
    """Plan the steps that start inside ``epoch``.

    Args:
        manifest: the data set; only its number of images matters.
        seed: any integer; the order is a function of (seed, epoch, row).
        epoch: from 0.
        batch_size: samples per step over all ranks.
        epochs: length of the run. Its very last step is cut there; without it that step would run on into the epoch
            after the last.
        sort_keys: where given, the samples *inside* each step are sorted by these keys (for example their augmented
            aspect ratio), so that a rank's slice holds images of like shape and pads less. Which samples a step holds
            does not change.

    Raises:
        ShardError: ``batch_size`` or ``epoch`` is out of range.
    """
    if batch_size < 1:
        raise ShardError(f"got batch_size {batch_size}, expected at least 1 sample per step over all ranks")
    if epoch < 0 or (epochs is not None and epoch >= epochs):
        raise ShardError(f"got epoch {epoch}, expected 0 <= epoch < {'any' if epochs is None else epochs}")
    images = manifest.images
    start_step, end_step = (first_step(number, images, batch_size) for number in (epoch, epoch + 1))
    start, stop = start_step * batch_size, end_step * batch_size
    if epochs is not None:
        start, stop = (min(position, epochs * images) for position in (start, stop))
    rows, sample_epochs = _stream(seed, images, start, stop)
    if sort_keys is not None and len(rows):
        steps = np.arange(len(rows)) // batch_size
        order = np.lexsort((sort_keys(rows, sample_epochs), steps))  # stable: ties keep the order of the stream
        rows, sample_epochs = rows[order], sample_epochs[order]
    return EpochPlan(epoch, batch_size, images, start_step, end_step, rows, sample_epochs)


def plan_evaluation(manifest: Manifest, *, batch_size: int) -> tuple[Ints, ...]:
    """Fixed batches of rows, each image in exactly one: whole batches go to ranks ``[rank::world_size]``.

    The batches do not depend on the number of ranks, so neither does anything computed from them. Images are sorted by
    aspect ratio (ties by row): after the resize to one shortest side that alone decides their shape, and images of
    like shape pad little.
    """
    if batch_size < 1:
        raise ShardError(f"got batch_size {batch_size}, expected at least 1 image per batch")
    images = manifest.index().images
    rows = np.argsort(images["width"] / images["height"], kind="stable").astype(np.int64)
    return tuple(rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def _stream(seed: int, images: int, start: int, stop: int) -> tuple[Ints, Ints]:
    """Positions [start, stop) of the concatenated epochs: rows and their epochs."""
    positions = np.arange(start, stop, dtype=np.int64)
    epochs = positions // images
    rows = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        inside = epochs == epoch
        rows[inside] = epoch_order(seed, epoch, images)[positions[inside] - epoch * images]
    return rows, epochs
