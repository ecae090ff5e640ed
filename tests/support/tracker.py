"""Tracker that keeps everything in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from pipeline.tracking.tracker import ReportedSteps


class MemoryTracker:
    """Tracker that keeps everything in lists, with the same rule about repeated steps as the spool."""

    def __init__(self) -> None:
        self.points: list[tuple[str, float, int]] = []
        self.pictures: list[tuple[str, int]] = []
        self.tables: dict[str, Mapping[str, list[Any]]] = {}
        self.files: dict[str, tuple[bytes, int]] = {}
        self.checkpoints: list[tuple[str, int]] = []
        self.last_tags: dict[str, str] = {}
        self._reported = ReportedSteps()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.metrics`."""
        self.points += [(name, value, step) for name, value in self._reported.new_values(values, step).items()]

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """See `Tracker.picture`."""
        self.pictures.append((key, step))

    def table(self, name: str, columns: Mapping[str, list[Any]], step: int | None = None) -> None:
        """See `Tracker.table`."""
        if step is None or not self._reported.is_outdated(f"table:{name}", step):
            self.tables[name] = columns

    def file(self, name: str, content: bytes, step: int) -> None:
        """See `Tracker.file`."""
        if not self._reported.is_outdated(f"file:{name}", step):
            self.files[name] = (content, step)

    def tags(self, values: Mapping[str, str]) -> None:
        """See `Tracker.tags`."""
        self.last_tags |= values

    def checkpoint(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.checkpoint`."""
        self.metrics(metrics, step)
        self.checkpoints.append((uri, step))

    def close(self) -> None:
        """Do nothing: there is nothing to send."""
