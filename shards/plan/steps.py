"""Cut the stream of samples, the concatenation of all epochs, into steps: pure arithmetic.

A run's position is the number of samples it has consumed; a step is one optimizer update, and steps are never
renumbered. From an *origin*, a step and the number of samples consumed before it, each step takes the next `batch_size`
samples. A run that continues with another batch size has a new origin there, and misses or repeats no sample.
"""

from dataclasses import dataclass

from shards.config import EpochTail
from shards.errors import ShardError


@dataclass(frozen=True)
class Origin:
    """The start of a cut: the first `step` steps have consumed `samples` samples."""

    step: int = 0
    samples: int = 0


START = Origin()


def ceil_div(dividend: int, divisor: int) -> int:
    """Return the quotient rounded up, exact for integers of any size."""
    return -(-dividend // divisor)


@dataclass(frozen=True)
class Steps:
    """The cut of a stream of epochs of `images` samples into steps of `batch_size` over all ranks.

    With the tail `straddle` every step is full, and may hold the end of one epoch and the start of the next; with
    `short` an epoch's last step holds the remaining samples. Steps before the origin are numbered as if cut like those
    after it.
    """

    images: int
    batch_size: int
    tail: EpochTail = "straddle"
    origin: Origin = START

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ShardError(f"got batch_size {self.batch_size}, expected at least 1 sample per step over all ranks")

    def position(self, step: int) -> int:
        """Return the number of samples that the steps before `step` consume."""
        step -= self.origin.step
        if self.tail == "short" and step > self._left:
            epochs, step = divmod(step - self._left, self._per_epoch)
            return (self._epoch + 1 + epochs) * self.images + step * self.batch_size
        position = max(self.origin.samples + step * self.batch_size, 0)
        return position if self.tail == "straddle" else min(position, (self._epoch + 1) * self.images)

    def at(self, position: int) -> int:
        """Return the first step that starts at `position` or later."""
        epoch, offset = divmod(position, self.images)
        if self.tail == "short" and epoch > self._epoch:
            steps = self._left + (epoch - self._epoch - 1) * self._per_epoch + ceil_div(offset, self.batch_size)
        else:
            steps = ceil_div(position - self.origin.samples, self.batch_size)
        return max(self.origin.step + steps, 0)

    @property
    def _epoch(self) -> int:
        """The epoch of the origin."""
        return self.origin.samples // self.images

    @property
    def _left(self) -> int:
        """Steps from the origin to the end of its epoch, if steps end with epochs."""
        return ceil_div((self._epoch + 1) * self.images - self.origin.samples, self.batch_size)

    @property
    def _per_epoch(self) -> int:
        """Steps of an epoch, if steps end with epochs."""
        return ceil_div(self.images, self.batch_size)
