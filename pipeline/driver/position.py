"""Position from which a run is resumed: its step, and the data and schedule that it continues with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.checkpoint import catalog
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import RunConfig
from pipeline.data.datasets import open_data
from pipeline.schedule import Schedule
from pipeline.tracking.tags import (
    TAG_EPOCHS,
    TAG_PENDING_WORKERS,
    TAG_PHASE,
    TAG_STREAM,
    TAG_TOTAL_STEPS,
    TAG_TRAIN_DIGEST,
    TAG_VAL_DIGEST,
)
from pipeline.training.continuation import Continuation, continuation
from shards.dataset.manifest import Manifest


@dataclass(frozen=True)
class Position:
    """Position after a run's newest checkpoint, which is None before the first."""

    newest: Location | None
    step: int
    train: Manifest
    val: Manifest
    schedule: Schedule
    stream: Continuation
    factor_before: float | None = None
    """Factor on the learning rates at the next step, by the schedule of the checkpoint; None if it is not known."""

    def is_trained(self, root: Location) -> bool:
        """Return True if no step is left and every checkpoint below `root` that needs metrics has them."""
        if self.newest is None or self.step < self.schedule.total_steps:
            return False
        return catalog.read_evaluation(self.newest) is not None and not catalog.pending_evaluation(root)

    @property
    def rate_change(self) -> str:
        """A line about a jump of the learning rates, which a schedule with another end may make; or an empty text."""
        before, now = self.factor_before, self.schedule.factor(self.step)
        if before is None or self.step >= self.schedule.total_steps or abs(before - now) <= 1e-9:
            return ""
        return (
            f"the schedule is another one: the factor on the learning rates at step {self.step} is {now:.4g}, with the "
            f"old one it would be {before:.4g}"
        )

    def tags(self, before: Mapping[str, str]) -> dict[str, str]:
        """Return the tags of the run that is resumed; `before` are the tags it has."""
        tags: dict[str, str] = {}
        if self.stream.changes:
            tags[TAG_STREAM] = self.stream.appended_to(before.get(TAG_STREAM, ""))
            tags[TAG_TRAIN_DIGEST] = self.train.digest
        if before.get(TAG_VAL_DIGEST, self.val.digest) != self.val.digest:
            tags[TAG_VAL_DIGEST] = self.val.digest
        tags[TAG_TOTAL_STEPS] = str(self.schedule.total_steps)
        tags[TAG_EPOCHS] = str(self.schedule.epoch(self.schedule.total_steps))
        tags[TAG_PHASE] = "starting"
        if before.get(TAG_PENDING_WORKERS):
            tags[TAG_PENDING_WORKERS] = ""  # left by a driver that was killed while it waited for resources
        return tags


def position_after(config: RunConfig, newest: Location | None, accept_change: bool) -> Position:
    """Return the position after the checkpoint `newest`; raise `CheckpointError` if it does not fit the data."""
    train, val = open_data(config.data)
    meta = read_meta(newest) if newest else None
    stream = continuation(meta, config, train, accept_change)
    schedule = Schedule(config.optim, train.images, config.data.epoch_tail, stream.origin)
    known = meta is not None and meta.total_steps > 0  # older checkpoints do not tell
    factor = meta.lr_factor if meta and known else None
    return Position(newest, meta.step if meta else 0, train, val, schedule, stream, factor)
