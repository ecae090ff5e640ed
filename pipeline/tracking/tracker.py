"""Interface between a run and its tracker, and the rule that no step is reported twice.

A run that continues from a checkpoint computes some steps again. Points of a family (the prefix of a metric's name
before the slash) at or below its last reported step are dropped, so that MLflow never shows a step twice. If steps may
come in any order, as those of evaluations in the background, exactly the reported steps are dropped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from PIL import Image

from pipeline.tracking.tags import TAG_WARNING

ATTEMPT_FAMILIES = ("workers", "restart")
"""Families whose points are events of an attempt, so that two attempts can report the same step."""
SUMMARY = "At_a_glance"
"""Section of the curves and pictures that MLflow shows first: it sorts sections by name, sometimes ignoring case.

Its curves repeat others and come with theirs, from training as from evaluations, so each is a family of its own.
"""
WORKERS = "workers/number"
"""Curve of the number of workers, by its name the last section."""
_WARNING_LOGGERS = ("shards", "pipeline.checkpoint", "pipeline.distributed")


class Tracker(Protocol):
    """Receiver of what a run reports. Calls return at once and never raise because of the tracker."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Report points of curves, named `family/name`; drop those of a family whose step was reported before."""

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """Report one frame of the picture series `key`."""

    def file(self, name: str, content: bytes, step: int) -> None:
        """Report the artifact `name`, a path, which keeps the content of the highest step."""

    def table(self, name: str, columns: Mapping[str, list[Any]], step: int | None = None) -> None:
        """Report a table by columns as the artifact `name`, which keeps the table of the highest step.

        Without a step it keeps the newest.
        """

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""

    def checkpoint(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        """Report an evaluated checkpoint and its metrics, which are also points of the curves."""

    def close(self) -> None:
        """Send what is left, if the server answers within a minute."""


class ReportedSteps:
    """Reported steps by family; with `any_order`, steps before the last one may still be reported."""

    def __init__(self, any_order: bool = False) -> None:
        self._any_order = any_order
        self._steps: dict[str, set[int]] = {}

    def add(self, family: str, step: int) -> None:
        """Record that a step is reported."""
        steps = self._steps.setdefault(family, set())
        if not self._any_order:
            steps.clear()  # the last step is enough
        steps.add(step)

    def contains(self, family: str, step: int) -> bool:
        """Return whether a step was reported, or must not be reported any more."""
        steps = self._steps.get(family, ())
        if self._any_order:
            return step in steps
        return family not in ATTEMPT_FAMILIES and step <= max(steps, default=-1)

    def is_outdated(self, family: str, step: int) -> bool:
        """Return whether a later step was reported; record this one if not."""
        if step < max(self._steps.get(family, ()), default=-1):
            return True
        self.add(family, step)
        return False

    def new_values(self, values: Mapping[str, float], step: int) -> dict[str, float]:
        """Return the finite values whose family was not reported at this step, and record them."""
        found = {
            name: float(value)
            for name, value in values.items()
            if math.isfinite(value) and not self.contains(family_of(name), step)
        }
        for name in found:
            self.add(family_of(name), step)
        return found


def family_of(name: str) -> str:
    """Return the family of a metric: what precedes the slash in its name, or its name in the summary."""
    family = name.partition("/")[0]
    return name if family == SUMMARY else family


@contextmanager
def forward_warnings(tracker: Tracker) -> Iterator[None]:
    """Report warnings about data and checkpoints in the block as a tag of the run: Ray keeps the workers' logs."""
    handler, loggers = _WarningHandler(tracker), [logging.getLogger(name) for name in _WARNING_LOGGERS]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _WarningHandler(logging.Handler):
    """Log handler that reports warnings to a tracker."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(logging.WARNING)
        self._tracker = tracker

    def emit(self, record: logging.LogRecord) -> None:
        """Set the warning tag of the run."""
        self._tracker.tags({TAG_WARNING: record.getMessage()[:500]})
