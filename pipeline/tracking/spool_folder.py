"""Files of a spool: its events, their pictures, and the number of bytes that were sent.

events.jsonl    one event a line, in order; only one process appends
*.png           a picture until it is sent; its event has the name
*.content       an artifact until it is sent
cursor          bytes of events.jsonl that were sent
id              random text that tells this spool from those of the run on other nodes
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path

from pipeline.tracking.events import Event, decode
from pipeline.tracking.server.answers import reason
from shards.store.storage import write_atomic

LOG = logging.getLogger(__name__)
_BATCH = 1000  # MLflow's largest number of metrics in one request
_EVENTS = "events.jsonl"
_CURSOR = "cursor"
_ID = "id"
CONTENT = ".content"
"""End of the names of artifacts that wait to be sent."""

Send = Callable[[list[Event]], None]


class SpoolFolder:
    """Folder of a spool on this node."""

    def __init__(self, path: Path) -> None:
        self.path, self.events = path, path / _EVENTS
        self.refusal = ""
        """Reason why the server did not take everything when it was last asked (`drain`)."""

    @property
    def id(self) -> str:
        """Id of the spool, empty if there is none."""
        path = self.path / _ID
        return path.read_text() if path.exists() else ""

    @property
    def size(self) -> int:
        """Bytes of events."""
        return self.events.stat().st_size if self.events.exists() else 0

    @property
    def sent(self) -> int:
        """Bytes of events that were sent."""
        path = self.path / _CURSOR
        sent = int(path.read_text() or 0) if path.exists() else 0  # empty after a power loss
        # The cursor is past the end if a power loss took lines that were sent: the lines written since then were not.
        return sent if sent <= self.size else 0

    @property
    def empty(self) -> bool:
        """True if all events were sent."""
        return self.sent >= self.size

    def create(self) -> None:
        """Make the folder if there is none, and remove what a kill or a power loss left of a line or of the cursor."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.id:
            write_atomic(self.path / _ID, secrets.token_hex(8).encode())
        self._cut_half_line()
        if self.sent == 0:
            (self.path / _CURSOR).unlink(missing_ok=True)  # a cursor past the end must not skip the lines to come

    def replace(self, lines: bytes, pictures: Mapping[str, bytes]) -> None:
        """Replace the spool by a new one with these events, of which none was sent."""
        new = self.path.with_name(f"{self.path.name}.new")
        self._discard(new)
        new.mkdir(parents=True)
        for name, picture in pictures.items():
            (new / name).write_bytes(picture)
        (new / _EVENTS).write_bytes(lines)
        (new / _ID).write_text(secrets.token_hex(8))
        self.remove()
        new.rename(self.path)

    def remove(self) -> None:
        """Delete the spool."""
        self.events.unlink(missing_ok=True)  # first: a spool that is half deleted has no events that look unsent
        self._discard(self.path)

    def read(self, start: int = 0, end: int | None = None) -> bytes:
        """Return the lines between two positions."""
        if not self.events.exists():
            return b""
        with self.events.open("rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else max(0, end - start))

    def flush(self, send: Send) -> bool:
        """Send the next `_BATCH` lines at most and move the cursor; return False if there were none.

        Raise what `send` raises; the cursor then stays, so that the next call sends the same lines.
        """
        start = self.sent
        with self.events.open("rb") as file:
            file.seek(start)
            lines = [line for line in islice(file, _BATCH) if line.endswith(b"\n")]
            if not lines:
                return False
            os.fsync(file.fileno())  # the cursor must not survive a power loss that the lines do not
        send(decode(lines, self.events))
        write_atomic(self.path / _CURSOR, str(start + sum(map(len, lines))).encode())
        return True

    def drain(self, send: Send, timeout_s: float = 60.0) -> bool:
        """Send what is left after the writer has ended; return False if the server does not accept it in that time.

        The time is short because a driver that was asked to stop is killed soon.
        """
        if not self.events.exists():
            return True
        self._cut_half_line()
        deadline = time.monotonic() + timeout_s
        try:
            while self.flush(send):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not finished after {timeout_s:.0f} s")
        except Exception as error:  # the client of the server may raise anything
            self.refusal = reason(error)
            return False
        return True

    def _cut_half_line(self) -> None:
        """Remove the last line if a kill left it without an end."""
        text = self.read()
        length = text.rfind(b"\n") + 1
        if length < len(text):
            with self.events.open("r+b") as file:
                file.truncate(length)

    @staticmethod
    def _discard(path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)
