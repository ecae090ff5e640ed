"""Tracker that never makes training wait for the server, and loses no event.

`SpoolTracker` appends every event (metrics, pictures, tables, tags, checkpoints) to a file on this node and returns at
once. A thread sends the lines to MLflow in order (`SpoolFolder.flush`). An outage of the server therefore delays events:
the next flush, or the next start of the run, sends them. `keep_unsent` writes what is not sent yet beside the run, so
that the next start may be on another node. Measured reasons: a synchronous call blocks for minutes of retries and then
kills training, and MLflow's own asynchronous logging drops what it could not send.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.tracking.events import Event, decode, encode, now_ms
from pipeline.tracking.server.answers import reason
from pipeline.tracking.spool_folder import CONTENT, Send, SpoolFolder
from pipeline.tracking.tracker import ReportedSteps, family_of
from pipeline.tracking.unsent import UnsentObject, open_spool
from shards.errors import ShardError, one_line
from shards.store.retry import fewer_retries
from shards.store.storage import write_atomic

LOG = logging.getLogger(__name__)


class SpoolTracker:
    """Tracker that appends events to the spool in `folder`; a thread passes them to `send` in order.

    Any thread may report, but only one process may write to `folder`: rank 0. `send` takes a list of events or raises,
    and is then called again; sending an event twice must do no harm. With `any_order` steps may come in any order, each
    once. `unsent` is the object for `keep_unsent`, from which a new spool starts.
    """

    def __init__(
        self,
        folder: Path,
        send: Send,
        unsent: UnsentObject | None = None,
        *,
        interval_s: float = 1.0,
        any_order: bool = False,
    ) -> None:
        self._spool, self._send, self._interval_s = SpoolFolder(folder), send, interval_s
        self._keep = open_spool(self._spool, unsent) if unsent else None
        if not unsent:
            self._spool.create()
        self._reported = ReportedSteps(any_order)
        for event in decode(self._spool.read().splitlines(), self._spool.events):
            self._read_reported_step(event)
        self._lock = threading.Lock()  # of what is reported, and of the end of the file
        self._file = self._spool.events.open("ab", buffering=0)
        self._size = self._spool.size
        self._unwritten = b""
        self._full = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.metrics`."""
        with self._lock:
            new = self._reported.new_values(values, step)
            if new:
                self._append(Event("metrics", now_ms(), step=step, values=new))

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        """See `Tracker.picture`."""
        family = f"picture:{key}"
        with self._lock:
            if self._reported.contains(family, step):
                return
        path = self._spool.path / f"{key.replace('/', '-')}-{step:08d}.png"
        try:
            image.save(path)
        except OSError as error:
            LOG.warning("picture %s of step %d is lost (%s)", key, step, error)
            return
        with self._lock:
            self._reported.add(family, step)
            self._append(Event("picture", now_ms(), step=step, name=key, tags={"file": path.name}))

    def file(self, name: str, content: bytes, step: int) -> None:
        """See `Tracker.file`. Only the newest content waits: the event of an older one that was not sent has none."""
        with self._lock:
            if self._reported.is_outdated(f"file:{name}", step):
                return
        prefix = f"{name.replace('/', '-')}-"
        path = self._spool.path / f"{prefix}{step:08d}{CONTENT}"
        before = [old for old in self._spool.path.glob(f"*{CONTENT}") if old.name.rpartition("-")[0] + "-" == prefix]
        try:
            write_atomic(path, content)
        except OSError as error:
            LOG.warning("file %s of step %d is lost (%s)", name, step, error)
            return
        for old in before:
            if old != path:
                old.unlink(missing_ok=True)
        with self._lock:
            self._append(Event("file", now_ms(), step=step, name=name, tags={"file": path.name}))

    def table(self, name: str, columns: Mapping[str, list[Any]], step: int | None = None) -> None:
        """See `Tracker.table`."""
        with self._lock:
            if step is None or not self._reported.is_outdated(f"table:{name}", step):
                self._append(Event("table", now_ms(), step=step or 0, name=name, columns=dict(columns)))

    def tags(self, values: Mapping[str, str]) -> None:
        """See `Tracker.tags`."""
        with self._lock:
            self._append(Event("tags", now_ms(), tags=dict(values)))

    def checkpoint(self, uri: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker.checkpoint`."""
        with self._lock:
            new = self._reported.new_values(metrics, step)
            if new:
                self._append(Event("checkpoint", now_ms(), step=step, name=uri, values=new))

    def keep_unsent(self) -> None:
        """Write what is not sent yet beside the run, or remove what was kept there; raise what the store raises.

        Reports of other threads do not wait for the store.
        """
        if self._keep:
            with self._lock:
                end, in_memory = self._size, self._unwritten
            self._keep(end, in_memory)

    def close(self, timeout_s: float = 60.0) -> None:
        """Flush and stop the thread; events that the server did not accept stay in the spool and beside the run."""
        self._stop.set()
        self._thread.join(timeout_s)
        self._file.close()
        try:
            with fewer_retries():
                # A worker that was cut off may end long after others have continued the run.
                if self._keep and not self._keep.superseded():
                    self.keep_unsent()
        except (OSError, ShardError) as error:
            LOG.warning("what the tracking server did not accept is on this node alone (%s)", one_line(error))
        if not self.empty:
            LOG.warning("the tracking server did not accept all events; the rest is kept in %s", self._spool.events)

    @property
    def empty(self) -> bool:
        """True if all events in the file have been sent."""
        return self._spool.empty

    def _append(self, event: Event) -> None:
        """Write a line; if the disk is full, keep it in memory and try again with the next line."""
        self._unwritten += encode(event)
        try:
            while self._unwritten:
                written = self._file.write(self._unwritten)
                self._size += written
                self._unwritten = self._unwritten[written:]
            self._full = False
        except OSError as error:
            if not self._full:
                LOG.warning("%s cannot be written (%s); events wait in memory", self._spool.events, error)
            self._full = True

    def _read_reported_step(self, event: Event) -> None:
        """Record a step that an earlier attempt has reported."""
        families = {family_of(name) for name in event.values}
        if event.kind in ("picture", "table", "file"):
            families = {f"{event.kind}:{event.name}"}
        for family in families:
            if not self._reported.contains(family, event.step):
                self._reported.add(family, event.step)

    def _run(self) -> None:
        wait_s, warned = self._interval_s, False
        while True:
            stopping = self._stop.wait(wait_s)
            try:
                while self._spool.flush(self._send):
                    pass
                wait_s, warned = self._interval_s, False
            except Exception as error:
                # Whatever the client raises, training continues: the lines stay and are sent in a later round.
                wait_s = min(60.0, wait_s * 2)
                if not warned:
                    LOG.warning(
                        "tracking is behind (%s); events are kept in %s and sent later",
                        reason(error),
                        self._spool.events,
                    )
                warned = True
            if stopping:
                return
