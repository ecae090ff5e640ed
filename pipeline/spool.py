"""Tracking that never takes training down and loses nothing.

`SpoolTracker` appends every event (metrics, pictures, tables, tags, checkpoints) to a JSON-lines file beside the run's
checkpoints and returns at once; a thread sends the file's lines to MLflow in order and remembers in a cursor how far it
came. An outage of the server therefore delays points and loses none: the next flush, or the next start of the run,
sends the rest. Measured reasons: a synchronous call blocks for minutes of retries and then kills training, and MLflow's
own asynchronous logging drops what it could not send.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from PIL import Image

from pipeline.errors import first_line
from pipeline.track import Event, Told

LOG = logging.getLogger(__name__)
_BATCH = 1000  # MLflow's largest number of metrics in one request


class SpoolTracker:
    """Appends to `folder/events.jsonl`; a thread hands the lines on to `send`, in order, until it takes them.

    folder: beside the run's checkpoints, so that it survives as they do. One process writes it: rank 0.
    send: takes a list of events or raises; sending an event twice must do no harm.
    any_order: steps may come in any order, each once.
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
        self._path, self._cursor = folder / "events.jsonl", folder / "cursor"
        self._told = Told(any_order)
        self._read_told()
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._full = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.metrics`."""
        fresh = self._told.fresh(values, step)
        if fresh:
            self._append(Event("metrics", _now_ms(), step=step, values=fresh))

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """See `Tracker.picture`."""
        family = f"picture:{key}"
        if self._told.knows(family, step):
            return
        path = self._folder / f"{key.replace('/', '-')}-{step:08d}.png"
        try:
            image.save(path)
        except OSError as error:
            LOG.warning("picture %s of step %d is lost (%s)", key, step, error)
            return
        self._told.add(family, step)
        self._append(Event("picture", _now_ms(), step=step, name=key, tags={"file": path.name}))

    def table(self, name: str, columns: Mapping[str, list[Any]], step: int | None = None) -> None:
        """See `Tracker.table`."""
        if step is None or not self._told.replaced(f"table:{name}", step):
            self._append(Event("table", _now_ms(), step=step or 0, name=name, columns=dict(columns)))

    def tags(self, values: Mapping[str, str]) -> None:
        """See `Tracker.tags`."""
        self._append(Event("tags", _now_ms(), tags=dict(values)))

    def checkpoint(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.checkpoint`."""
        fresh = self._told.fresh(metrics, step)
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
        return not unsent(self._folder)

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

    def _read_told(self) -> None:
        """What earlier attempts told, from their spool; cuts off a line that a kill left half written."""
        if not self._path.exists():
            return
        text = self._path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        if _sent(self._folder) == 0:
            self._cursor.unlink(missing_ok=True)  # one past the end must not count the lines to come
        for event in _decode(whole.splitlines(), self._path):
            families = {name.split("/")[0] for name in event.values}
            if event.kind in ("picture", "table"):
                families = {f"{event.kind}:{event.name}"}
            for family in families:
                if not self._told.knows(family, event.step):
                    self._told.add(family, event.step)

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
        start = _sent(self._folder)
        with self._path.open("rb") as file:
            file.seek(start)
            lines = [line for _, line in zip(range(_BATCH), file, strict=False) if line.endswith(b"\n")]
            if not lines:
                return False
            os.fsync(file.fileno())  # the cursor must not outlive the lines that it counts
        self._send(_decode(lines, self._path))
        aside = self._cursor.with_suffix(".partial")
        aside.write_text(str(start + sum(map(len, lines))))
        aside.replace(self._cursor)
        return True


def _sent(folder: Path) -> int:
    """How many bytes of the spool were sent."""
    path = folder / "cursor"
    # Empty after a power loss between rename and write-back: sending again does no harm.
    sent = int(path.read_text() or 0) if path.exists() else 0
    # Past the end where the power took lines that were sent: those written since then were not.
    return sent if sent <= _size(folder) else 0


def _size(folder: Path) -> int:
    path = folder / "events.jsonl"
    return path.stat().st_size if path.exists() else 0


def unsent(folder: Path) -> bool:
    """Whether the spool holds what no server has taken yet."""
    return _sent(folder) < _size(folder)


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
