"""What a run tells of itself, and the rule by which it tells nothing twice; `pipeline/spool.py` keeps and sends it.

A run that goes on from a checkpoint computes some steps a second time. Points of a family (the part of a metric's name
before the slash) at or below the last step that was told are dropped, so that MLflow never shows a step twice. Where steps
come in any order, as evaluations beside the training may, it is the very steps that were told which are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from PIL import Image

TAG_PHASE = "detr.phase"
"""Run tag: what the run is doing now."""
TAG_WARNING = "detr.warning"
"""Run tag: what went wrong last and may pass, such as a store that does not answer. A cause that has a tag of its own,
named after this one and a dot, empties it when it has passed."""
TAG_RESIZED = "detr.resized"
"""Run tag: when the number of workers changed last because the cluster had room for another."""
TAG_LEFT_OUT = "detr.left_out"
"""Run tag: images that are not trained on."""
_EVENTS = ("cluster", "restart")
"""Families whose points are events of an attempt and not of a step: each is told once, two attempts at one step apart."""


class Tracker(Protocol):
    """What the training loop tells the world. Calls return at once and never raise for the tracker's sake."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves, named `family/name`. A family's step that was told before is dropped."""

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """One frame of the picture series `key`."""

    def table(self, name: str, columns: Mapping[str, list[Any]], step: int | None = None) -> None:
        """A table by columns, kept as the artifact `name`: that of the last step, whatever the order they are told in, or
        without a step the newest.
        """

    def tags(self, values: Mapping[str, str]) -> None:
        """What the run is doing now, for people and for `detr runs`."""

    def checkpoint(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluated checkpoint and its figures, which are points of the run's curves as well."""

    def close(self) -> None:
        """Send what is left, as far as the server answers within a while."""


class Event(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A line of the spool. `kind` says which of the other fields matter."""

    kind: str
    time_ms: int
    step: int = 0
    name: str = ""
    values: dict[str, float] = {}
    tags: dict[str, str] = {}
    columns: dict[str, list[Any]] = {}


class MemoryTracker:
    """Keeps everything in lists, with the same rule about steps told twice; tests use it."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []
        self.pictures: list[tuple[str, int]] = []
        self.tables: dict[str, Mapping[str, list[Any]]] = {}
        self.checkpoints: list[tuple[str, int]] = []
        self.last_tags: dict[str, str] = {}
        self._told = Told()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.metrics`."""
        self.points += [(name, value, step) for name, value in self._told.fresh(values, step).items()]

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """See `Tracker.picture`."""
        self.pictures.append((key, step))

    def table(self, name: str, columns: Mapping[str, list[Any]], step: int | None = None) -> None:
        """See `Tracker.table`."""
        if step is None or not self._told.replaced(f"table:{name}", step):
            self.tables[name] = columns

    def tags(self, values: Mapping[str, str]) -> None:
        """See `Tracker.tags`."""
        self.last_tags |= values

    def checkpoint(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.checkpoint`."""
        self.metrics(metrics, step)
        self.checkpoints.append((uri, step))

    def close(self) -> None:
        """Nothing is left to send."""


class Told:
    """The steps that were told, by family.

    any_order: a step before another that was told may still be told.
    """

    def __init__(self, any_order: bool = False) -> None:
        self._any_order = any_order
        self._steps: dict[str, set[int]] = {}

    def add(self, family: str, step: int) -> None:
        """It is told now."""
        steps = self._steps.setdefault(family, set())
        if not self._any_order:
            steps.clear()  # the last one stands for those before
        steps.add(step)

    def knows(self, family: str, step: int) -> bool:
        """Whether it was told, or must not be told any more."""
        steps = self._steps.get(family, ())
        if self._any_order:
            return step in steps
        return family not in _EVENTS and step <= max(steps, default=-1)

    def replaced(self, family: str, step: int) -> bool:
        """Whether one of a later step was told; it is told now otherwise."""
        if step < max(self._steps.get(family, ()), default=-1):
            return True
        self.add(family, step)
        return False

    def fresh(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """The finite values whose family is not known at this step, which is noted as told."""
        found = {
            name: float(value)
            for name, value in values.items()
            if math.isfinite(value) and not self.knows(name.split("/")[0], step)
        }
        for name in found:
            self.add(name.split("/")[0], step)
        return found
