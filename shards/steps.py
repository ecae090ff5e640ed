"""How the stream of samples, the concatenation of all epochs, is cut into steps: pure arithmetic.

A run's position is the number of samples it has consumed; a step is one optimizer update and counts on whatever
happens. From an *origin*, where so many steps have consumed so many samples, each step takes the next ``batch_size``
samples. A run that goes on with another batch size has a new origin there and misses or repeats no sample.
"""

from dataclasses import dataclass
from typing import Literal

from shards.errors import ShardError

EpochTail = Literal["straddle", "short"]


@dataclass(frozen=True)
class Origin:
    """Where a cut begins: ``step`` steps have consumed ``samples`` samples."""

    step: int = 0
    samples: int = 0


START = Origin()


@dataclass(frozen=True)
class Steps:
    """The cut of a stream of epochs of ``images`` samples into steps of ``batch_size`` over all ranks.

    With the tail ``straddle`` every step is full, and one in which an epoch ends begins the next; with ``short`` an
    epoch's last step holds what is left. Steps before the origin count as if they had been cut as those after it.
    """

    images: int
    batch_size: int
    tail: EpochTail = "straddle"
    origin: Origin = START

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ShardError(f"got batch_size {self.batch_size}, expected at least 1 sample per step over all ranks")

    def position(self, step: int) -> int:
        """Samples that the steps before ``step`` consume."""
        step -= self.origin.step
        if self.tail == "short" and step > self._left:
            epochs, step = divmod(step - self._left, self._per_epoch)
            return (self._epoch + 1 + epochs) * self.images + step * self.batch_size
        position = max(self.origin.samples + step * self.batch_size, 0)
        return position if self.tail == "straddle" else min(position, (self._epoch + 1) * self.images)

    def at(self, position: int) -> int:
        """The first step that starts at ``position`` or later."""
        epoch, offset = divmod(position, self.images)
        if self.tail == "short" and epoch > self._epoch:
            steps = self._left + (epoch - self._epoch - 1) * self._per_epoch - (-offset // self.batch_size)
        else:
            steps = -((self.origin.samples - position) // self.batch_size)
        return max(self.origin.step + steps, 0)

    @property
    def _epoch(self) -> int:
        """The epoch of the origin."""
        return self.origin.samples // self.images

    @property
    def _left(self) -> int:
        """Steps of that epoch from the origin on, where steps end with epochs."""
        return -((self.origin.samples - (self._epoch + 1) * self.images) // self.batch_size)

    @property
    def _per_epoch(self) -> int:
        return -(-self.images // self.batch_size)


def first_step(epoch: int, images: int, batch_size: int) -> int:
    """The first step that starts inside ``epoch`` or later: ceil(epoch * images / batch_size).

    ``first_step(epochs, ...)`` is also the number of steps of a run of that many epochs, cut from their concatenation.
    """
    return Steps(images, batch_size).at(epoch * images)
