"""Continuation of a run: check that it reads the same stream of samples, or enter another one.

The position of a run is a number of samples. It is valid only for the stream it was counted in, which depends on the
data set, the seed, the global batch and the options of the plan. Every checkpoint stores these, and a run continues
only with the same values, unless the user accepts the change. The new stream is then entered at the sample where the
old one was left, and divided into steps from there (`Origin`), so nothing has to be a multiple of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.checkpoint.metadata import Meta
from pipeline.config import RunConfig
from pipeline.errors import CheckpointError
from shards.dataset.manifest import Manifest
from shards.plan.epoch import PLAN_VERSION
from shards.plan.steps import START, Origin

# The order of the stream depends on these; the other values only affect how it is sorted and divided into steps.
_ORDER = ("training data digest", "seed", "data.shuffle_shards", "order of the plan")


@dataclass(frozen=True)
class Continuation:
    """Position and stream of samples from which a run continues."""

    origin: Origin = START
    """Step and sample from which the stream is divided into steps."""
    changes: tuple[str, ...] = ()
    """Changed values that the stream depends on, as text."""
    exact: bool = True
    """True if each image of the current epoch is still shown once."""

    def __str__(self) -> str:
        return f"from step {self.origin.step} ({self.origin.samples} samples) on: {', '.join(self.changes)}"

    def message(self, images: int) -> str:
        """Describe the change in one line, for a data set of `images` images."""
        shown = "shows the rest of that epoch" if self.exact else "may show images of that epoch again or never"
        return (
            f"another stream of samples {self}; it is entered at epoch {self.origin.samples / images:.2f} and {shown}"
        )

    def appended_to(self, before: str) -> str:
        """Append this change to the text of earlier ones, unless it is the last of them.

        It is there already if an earlier resume accepted it and ended before a checkpoint.
        """
        return before if before.endswith(str(self)) else f"{before}; {self}".removeprefix("; ")


def continuation(meta: Meta | None, config: RunConfig, train: Manifest, accept_change: bool) -> Continuation:
    """Return how a run continues from the checkpoint described by `meta`; None starts it at the first sample.

    Raise `CheckpointError` if the stream changed and `accept_change` is false, or if the number of classes changed.
    """
    if meta is None:
        return Continuation()
    if meta.num_classes != train.num_classes:
        raise CheckpointError(
            f"the checkpoint of step {meta.step} is of {meta.num_classes} classes and {train.url} has "
            f"{train.num_classes}; expected the same: restore the data, or start a new run with --initial"
        )
    values = {
        "training data digest": (meta.train_digest, train.digest),
        "seed": (meta.option("seed"), config.seed),
        "optim.batch_size": (meta.option("optim.batch_size"), config.optim.batch_size),
        "data.sort_window": (meta.option("data.sort_window"), config.data.sort_window),
        "data.shuffle_shards": (meta.option("data.shuffle_shards"), config.data.shuffle_shards),
        "data.epoch_tail": (meta.option("data.epoch_tail"), config.data.epoch_tail),
        "order of the plan": (meta.plan_version, PLAN_VERSION),
    }
    changed = {name: (was, now) for name, (was, now) in values.items() if was != now}
    if not changed:
        return Continuation(Origin(meta.origin_step, meta.origin_samples))
    if not accept_change:
        name, (was, now) = next(iter(changed.items()))
        raise CheckpointError(
            f"the checkpoint of step {meta.step} was made with {name} {was}, now it is {now}; expected the same, or "
            "images would be seen twice or never: restore it, or continue with the new one after "
            f"{meta.samples} samples by `detr resume --accept-change`"
        )
    # With a sort window above 1, the steps so far also took samples from after this position.
    exact = not any(name in changed for name in _ORDER) and meta.option("data.sort_window") == 1
    changes = tuple(f"{name} {was} -> {now}" for name, (was, now) in changed.items())
    return Continuation(Origin(meta.step, meta.samples), changes, exact)
