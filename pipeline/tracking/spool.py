"""Spool of a run's tracking events: training never waits for the server, and no event is lost.

`SpoolTracker` appends every event (metrics, pictures, tables, tags, checkpoints) to a JSON-lines file beside the run's
checkpoints and returns at once. A thread sends the lines to MLflow in order and keeps the number of bytes sent in a
cursor file. An outage of the server therefore delays events: the next flush, or the next start of the run, sends them.
Measured reasons: a synchronous call blocks for minutes of retries and then kills training, and MLflow's own
asynchronous logging drops what it could not send.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from pipeline.tracking.tracker import ReportedSteps
from shards.errors import one_line
from shards.store.storage import write_atomic

LOG = logging.getLogger(__name__)
_BATCH = 1000  # MLflow's largest number of metrics in one request
_EVENTS = "events.jsonl"
_CURSOR = "cursor"


class Event(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Line of the spool; which of the other fields are used depends on `kind`."""

    kind: str
    time_ms: int
    step: int = 0
    name: str = ""
    values: dict[str, float] = {}
    tags: dict[str, str] = {}
    columns: dict[str, list[Any]] = {}


class SpoolTracker:
    """Tracker that appends events to `folder/events.jsonl`; a thread passes them to `send` in order.

    Only one process may write to `folder`: rank 0. `send` takes a list of events or raises, and is then called again;
    sending an event twice must do no harm. With `any_order` steps may come in any order, each once.
    """

    def __init__(
        self,
        folder: Path,
        send: Callable[[list[Event]], None],
        *,
        interval_s: float = 1.0,
        any_order: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._send, self._interval_s = folder, send, interval_s
        self._path = folder / _EVENTS
        self._reported = ReportedSteps(any_order)
        self._read_reported_steps()
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._full = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.metrics`."""
        new = self._reported.new_values(values, step)
        if new:
            self._append(Event("metrics", _now_ms(), step=step, values=new))

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """See `Tracker.picture`."""
        family = f"picture:{key}"
        if self._reported.contains(family, step):
            return
        path = self._folder / f"{key.replace('/', '-')}-{step:08d}.png"
        try:
            image.save(path)
        except OSError as error:
            LOG.warning("picture %s of step %d is lost (%s)", key, step, error)
            return
        self._reported.add(family, step)
        self._append(Event("picture", _now_ms(), step=step, name=key, tags={"file": path.name}))

    def table(self, name: str, columns: Mapping[str, list[Any]], step: int | None = None) -> None:
        """See `Tracker.table`."""
        if step is None or not self._reported.is_outdated(f"table:{name}", step):
            self._append(Event("table", _now_ms(), step=step or 0, name=name, columns=dict(columns)))

    def tags(self, values: Mapping[str, str]) -> None:
        """See `Tracker.tags`."""
        self._append(Event("tags", _now_ms(), tags=dict(values)))

    def checkpoint(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.checkpoint`."""
        new = self._reported.new_values(metrics, step)
        if new:
            self._append(Event("checkpoint", _now_ms(), step=step, name=uri, values=new))

    def close(self, timeout_s: float = 60.0) -> None:
        """Flush and stop the thread; events that the server did not accept stay in the spool, see `drain`."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._file.close()
        if not self.empty:
            LOG.warning("the tracking server did not accept all events; the rest is kept in %s", self._path)

    @property
    def empty(self) -> bool:
        """True if all events in the file have been sent."""
        return not unsent(self._folder)

    def _append(self, event: Event) -> None:
        """Write a line; if the disk is full, keep it in memory and try again with the next line."""
        self._unwritten += msgspec.json.encode(event) + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._full = False
        except OSError as error:
            if not self._full:
                LOG.warning("%s cannot be written (%s); events wait in memory", self._path, error)
            self._full = True

    def _read_reported_steps(self) -> None:
        """Read from the spool which steps earlier attempts have reported."""
        if not self._path.exists():
            return
        _cut_half_line(self._folder)
        if _sent(self._folder) == 0:
            (self._folder / _CURSOR).unlink(missing_ok=True)  # a cursor past the end must not skip the lines to come
        for event in _decode(self._path.read_bytes().splitlines(), self._path):
            families = {name.split("/")[0] for name in event.values}
            if event.kind in ("picture", "table"):
                families = {f"{event.kind}:{event.name}"}
            for family in families:
                if not self._reported.contains(family, event.step):
                    self._reported.add(family, event.step)

    def _run(self) -> None:
        wait_s, warned = self._interval_s, False
        while True:
            stopping = self._stop.wait(wait_s)
            try:
                while flush(self._folder, self._send):
                    pass
                wait_s, warned = self._interval_s, False
            except Exception as error:
                # Whatever the client raises, training continues: the lines stay and are sent in a later round.
                wait_s = min(60.0, wait_s * 2)
                if not warned:
                    LOG.warning(
                        "tracking is behind (%s); events are kept in %s and sent later", one_line(error), self._path
                    )
                warned = True
            if stopping:
                return


def flush(folder: Path, send: Callable[[list[Event]], None]) -> bool:
    """Send the next `_BATCH` lines of a spool at most and move its cursor; return False if there were none.

    Raise what `send` raises; the cursor then stays, so that the next call sends the same lines.
    """
    path, start = folder / _EVENTS, _sent(folder)
    with path.open("rb") as file:
        file.seek(start)
        lines = [line for line in islice(file, _BATCH) if line.endswith(b"\n")]
        if not lines:
            return False
        os.fsync(file.fileno())  # the cursor must not survive a power loss that the lines do not
    send(_decode(lines, path))
    write_atomic(folder / _CURSOR, str(start + sum(map(len, lines))).encode())
    return True


def drain(folder: Path, send: Callable[[list[Event]], None], timeout_s: float = 60.0) -> bool:
    """Send what is left in a spool whose writer has ended; return False if the server does not accept it in that time.

    The time is short because a driver that was asked to stop is killed soon.
    """
    if not (folder / _EVENTS).exists():
        return True
    _cut_half_line(folder)
    deadline = time.monotonic() + timeout_s
    try:
        while flush(folder, send):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not finished after {timeout_s:.0f} s")
    except Exception as error:  # the client of the server may raise anything
        LOG.warning(
            "the tracking server did not accept all events (%s); the rest is kept in %s", one_line(error), folder
        )
        return False
    return True


def unsent(folder: Path) -> bool:
    """Return whether a spool has events that were not sent."""
    return _sent(folder) < _size(folder)


def _sent(folder: Path) -> int:
    """Return how many bytes of the spool were sent."""
    path = folder / _CURSOR
    sent = int(path.read_text() or 0) if path.exists() else 0  # empty after a power loss
    # The cursor is past the end if a power loss took lines that were sent: the lines written since then were not.
    return sent if sent <= _size(folder) else 0


def _size(folder: Path) -> int:
    path = folder / _EVENTS
    return path.stat().st_size if path.exists() else 0


def _cut_half_line(folder: Path) -> None:
    """Remove the last line if a kill left it without an end."""
    path = folder / _EVENTS
    text = path.read_bytes()
    length = text.rfind(b"\n") + 1
    if length < len(text):
        with path.open("r+b") as file:
            file.truncate(length)


def _decode(lines: Iterable[bytes], path: Path) -> list[Event]:
    """Return the events of lines; skip a damaged one, which must neither stop a run nor block later lines."""
    events = []
    for line in lines:
        try:
            events.append(msgspec.json.decode(line, type=Event))
        except msgspec.DecodeError as error:
            LOG.warning("a damaged line of %s is skipped (%s)", path, error)
    return events


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
