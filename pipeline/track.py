"""Tracking that never takes training down and loses nothing.

`SpoolTracker` appends every event (metrics, pictures, tables, tags, checkpoints) to a JSON-lines file beside the run's
checkpoints and returns at once; a thread sends the file's lines to MLflow in order and remembers in a cursor how far it
came. An outage of the server therefore delays points and loses none: the next flush, or the next start of the run,
sends the rest. Measured reasons: a synchronous call blocks for minutes of retries and then kills training, and MLflow's
own asynchronous logging drops what it could not send.

A run that goes on from a checkpoint computes some steps a second time. Points of a family (the part of a metric's name
before the slash) at or below the last step in the spool are dropped, so that MLflow never shows a step twice.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec
from PIL import Image

from pipeline.errors import first_line

LOG = logging.getLogger(__name__)
TAG_PHASE = "detr.phase"
"""Run tag: what the run is doing now."""
TAG_WARNING = "detr.warning"
"""Run tag: what went wrong last and may pass, such as a store that does not answer. A cause that has a tag of its own,
named after this one and a dot, empties it when it has passed."""
TAG_RESIZED = "detr.resized"
"""Run tag: when the number of workers changed last because the cluster had room for another."""
TAG_LEFT_OUT = "detr.left_out"
"""Run tag: images that are not trained on."""
_BATCH = 1000  # MLflow's largest number of metrics in one request


class Tracker(Protocol):
    """What the training loop tells the world. Calls return at once and never raise for the tracker's sake."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves, named `family/name`. A family's step that was told before is dropped."""

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """One frame of the picture series `key`."""

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """A table by columns, kept as the artifact `name`; the newest replaces the one before."""

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
        self._told: dict[str, int] = {}

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.metrics`."""
        self.points += [(name, value, step) for name, value in _untold(values, step, self._told).items()]

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """See `Tracker.picture`."""
        self.pictures.append((key, step))

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """See `Tracker.table`."""
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


def _untold(values: Mapping[str, float], step: int, told: dict[str, int]) -> dict[str, float]:
    """The finite values whose family has no point at `step` or later; notes the step in `told`."""
    fresh = {
        name: float(value)
        for name, value in values.items()
        if step > told.get(name.split("/")[0], -1) and math.isfinite(value)
    }
    for name in fresh:
        told[name.split("/")[0]] = step
    return fresh


class SpoolTracker:
    """Appends to `folder/events.jsonl`; a thread hands the lines on to `send`, in order, until it takes them.

    folder: beside the run's checkpoints, so that it survives as they do. One process writes it: rank 0.
    send: takes a list of events or raises; sending an event twice must do no harm.
    """

    def __init__(self, folder: Path, send: Callable[[list[Event]], None], *, interval_s: float = 1.0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._send, self._interval_s = folder, send, interval_s
        self._path, self._cursor = folder / "events.jsonl", folder / "cursor"
        self._told = self._read_told()
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._full = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.metrics`."""
        fresh = _untold(values, step, self._told)
        if fresh:
            self._append(Event("metrics", _now_ms(), step=step, values=fresh))

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """See `Tracker.picture`."""
        family = f"picture:{key}"
        if step <= self._told.get(family, -1):
            return
        path = self._folder / f"{key.replace('/', '-')}-{step:08d}.png"
        try:
            image.save(path)
        except OSError as error:
            LOG.warning("picture %s of step %d is lost (%s)", key, step, error)
            return
        self._told[family] = step
        self._append(Event("picture", _now_ms(), step=step, name=key, tags={"file": path.name}))

    def table(self, name: str, columns: Mapping[str, list[Any]]) -> None:
        """See `Tracker.table`."""
        self._append(Event("table", _now_ms(), name=name, columns=dict(columns)))

    def tags(self, values: Mapping[str, str]) -> None:
        """See `Tracker.tags`."""
        self._append(Event("tags", _now_ms(), tags=dict(values)))

    def checkpoint(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.checkpoint`."""
        fresh = _untold(metrics, step, self._told)
        if fresh:
            self._append(Event("checkpoint", _now_ms(), step=step, name=uri, values=fresh))

    def close(self, timeout_s: float = 60.0) -> None:
        """Flush and stop the thread. What the server did not take stays in the spool: see `drain`."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._file.close()
        if not self.empty:
            LOG.warning("the tracking server did not take everything; the rest is kept in %s", self._path)

    @property
    def empty(self) -> bool:
        """Whether everything in the file has been sent."""
        return self._unsent_from() >= self._path.stat().st_size

    def _append(self, event: Event) -> None:
        """Write the line; what a full disk refuses waits in memory and is tried again with the next line."""
        self._unwritten += msgspec.json.encode(event) + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._full = False
        except OSError as error:
            if not self._full:
                LOG.warning("%s cannot be written (%s); events wait in memory", self._path, error)
            self._full = True

    def _read_told(self) -> dict[str, int]:
        """Last step per family in the spool of earlier attempts; cuts off a line that a kill left half written."""
        told: dict[str, int] = {}
        if not self._path.exists():
            return told
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        for event in _decode(whole.splitlines(), self._path):
            families = {name.split("/")[0] for name in event.values}
            if event.kind == "picture":
                families = {f"picture:{event.name}"}
            for family in families:
                told[family] = max(event.step, told.get(family, -1))
        return told

    def _unsent_from(self) -> int:
        # Empty after a power loss between rename and write-back: sending again does no harm.
        return int(self._cursor.read_text() or 0) if self._cursor.exists() else 0

    def _run(self) -> None:
        wait_s, warned = self._interval_s, False
        while True:
            stopping = self._stop.wait(wait_s)
            try:
                while self._flush():
                    pass
                wait_s, warned = self._interval_s, False
            except Exception as error:
                # Whatever the server's client raises: training goes on, the lines stay, the next round tries again.
                wait_s = min(60.0, wait_s * 2)
                if not warned:
                    LOG.warning(
                        "tracking is behind (%s); events are kept in %s and sent later", first_line(error), self._path
                    )
                warned = True
            if stopping:
                return

    def _flush(self) -> bool:
        """Send up to `_BATCH` lines; false when none is left."""
        start = self._unsent_from()
        with self._path.open("rb") as file:
            file.seek(start)
            lines = [line for _, line in zip(range(_BATCH), file, strict=False) if line.endswith(b"\n")]
        if not lines:
            return False
        self._send(_decode(lines, self._path))
        aside = self._cursor.with_suffix(".partial")
        aside.write_text(str(start + sum(map(len, lines))))
        aside.replace(self._cursor)
        return True


def drain(folder: Path, send: Callable[[list[Event]], None]) -> bool:
    """Send what the spool's writer, which has ended, could not; false when the server does not take it either."""
    if not folder.exists():
        return True
    spool = SpoolTracker(folder, send)
    spool.close()
    return spool.empty


def _decode(lines: Iterable[bytes], path: Path) -> list[Event]:
    """The events of a spool's lines. One damaged line must neither stop a run nor hold back the lines after it."""
    events = []
    for line in lines:
        try:
            events.append(msgspec.json.decode(line, type=Event))
        except msgspec.DecodeError as error:
            LOG.warning("a damaged line of %s is left out (%s)", path, error)
    return events


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
