"""Which stream of samples a run's position counts in, and how a run goes on in another one.

The position is a number of samples. It means something only together with what the stream is a function of: the data
set, the seed, the global batch and the options of the plan. Every checkpoint says them, and a run goes on only under the
same ones, unless a person accepts the change. Then the new stream is entered at the sample where the old one was left,
and cut into steps from there on (`Origin`), so nothing has to be a multiple of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.config import RunConfig
from pipeline.errors import CheckpointError, RunConfigError
from pipeline.meta import Meta
from shards import storage
from shards.manifest import Manifest
from shards.plan import PLAN_VERSION
from shards.steps import START, Origin

# What the order of the stream itself depends on; the rest is how it is cut and sorted.
_ORDER = ("training data digest", "seed", "data.shuffle_shards", "order of the plan")


@dataclass(frozen=True)
class Changes:
    """What is different when a run goes on."""

    epochs: int | None = None
    """Train to this many instead."""
    batch_size: int | None = None
    data: str | None = None
    """Training data."""
    accept: bool = False
    """Go on although data or batch size, and so the stream of samples, are others (`pipeline/identity.py`)."""

    def of(self, config: RunConfig) -> RunConfig:
        """The configuration with these changes; other data is checked as that of a new run is."""
        optim, data = config.optim, config.data
        if self.epochs is not None:
            if self.epochs < optim.epochs:
                raise RunConfigError(
                    f"--epochs {self.epochs} is less than the run's {optim.epochs}; expected as many or more: "
                    "start a new run for a shorter schedule"
                )
            optim = replace(optim, epochs=self.epochs, max_steps=0)
        if self.batch_size is not None:
            optim = replace(optim, batch_size=self.batch_size)
        if self.data is not None:
            data = replace(data, train=storage.absolute(self.data), built_in=False)
        changed = replace(config, optim=optim, data=data)
        if self.data is not None:
            from pipeline.preflight import check_data

            check_data(changed)
        return changed


@dataclass(frozen=True)
class Continuation:
    """How a run goes on: where its cut into steps begins, what of its identity changed, and whether it stays exact."""

    origin: Origin = START
    changes: tuple[str, ...] = ()
    exact: bool = True
    """Each image of the epoch under way is still shown once."""

    def __str__(self) -> str:
        return f"from step {self.origin.step} ({self.origin.samples} samples) on: {', '.join(self.changes)}"

    def told(self, images: int) -> str:
        """The change in one line, for a data set of so many images."""
        shown = "shows the rest of that epoch" if self.exact else "may show images of that epoch again or never"
        return (
            f"another stream of samples {self}; it is entered at epoch {self.origin.samples / images:.2f} and {shown}"
        )

    def appended_to(self, before: str) -> str:
        """The changes of a run so far and this one, which may have been accepted before and come to nothing."""
        return before if before.endswith(str(self)) else f"{before}; {self}".removeprefix("; ")


def continuation(meta: Meta | None, config: RunConfig, train: Manifest, accept_change: bool) -> Continuation:
    """How a run goes on from the checkpoint that `meta` is of, or begins where there is none.

    Raises `CheckpointError` where the stream is another one and the change is not accepted, and where the classes are
    others, which no model can take.
    """
    if meta is None:
        return Continuation()
    if meta.num_classes != train.num_classes:
        raise CheckpointError(
            f"the checkpoint of step {meta.step} is of {meta.num_classes} classes and {train.url} has "
            f"{train.num_classes}; expected the same: restore the data, or start a new run with --initial"
        )
    known = {
        "training data digest": (meta.train_digest, train.digest),
        "seed": (meta.seed, config.seed),
        "optim.batch_size": (meta.batch_size, config.optim.batch_size),
        "data.sort_window": (meta.sort_window, config.data.sort_window),
        "data.shuffle_shards": (meta.shuffle_shards, config.data.shuffle_shards),
        "data.epoch_tail": (meta.epoch_tail, config.data.epoch_tail),
        "order of the plan": (meta.plan_version, PLAN_VERSION),
    }
    changed = {name: values for name, values in known.items() if values[0] != values[1]}
    if not changed:
        return Continuation(Origin(meta.origin_step, meta.origin_samples))
    if not accept_change:
        name, (was, now) = next(iter(changed.items()))
        raise CheckpointError(
            f"the checkpoint of step {meta.step} was made with {name} {was}, now it is {now}; expected the same, or "
            "images would be seen twice or never: restore it, or let `detr resume --accept-change` go on with the "
            f"new one after {meta.samples} samples"
        )
    # Sorting over several steps takes samples from ahead, so what was shown is then not the stream up to here.
    exact = not any(name in changed for name in _ORDER) and meta.sort_window == 1
    changes = tuple(f"{name} {was} -> {now}" for name, (was, now) in changed.items())
    return Continuation(Origin(meta.step, meta.samples), changes, exact)
