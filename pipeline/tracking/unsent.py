"""Object beside a run with the events that MLflow has not taken yet, in case the node with the spool is lost.

It is written before anything that will not be computed again is recorded (a checkpoint, its metrics), so that a spool
on another node can start from it: the events after it are computed again. It is a zip file, whole or absent:

    spool.json      id of the spool, and the position in its events up to which the object is complete
    events.jsonl    events that were not sent
    *.png           their pictures
    *.content       their artifacts
"""

from __future__ import annotations

import io
import logging
import threading
import zipfile
from pathlib import PurePath

import msgspec

from pipeline.tracking.events import decode
from pipeline.tracking.spool_folder import CONTENT, SpoolFolder
from shards.errors import one_line
from shards.store import storage

LOG = logging.getLogger(__name__)
_SPOOL = "spool.json"
_EVENTS = "events.jsonl"


class Unsent(msgspec.Struct):
    """Events of a spool that were not sent when it was kept."""

    spool: str
    end: int
    lines: bytes
    pictures: dict[str, bytes]


class UnsentObject:
    """Object in the run's location; `url` is its address or path."""

    def __init__(self, url: str) -> None:
        self.url = url

    def read(self) -> Unsent | None:
        """Return what was kept, or None; a damaged object is reported and removed."""
        try:
            content = storage.read(self.url)
        except FileNotFoundError:
            return None
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                spool = msgspec.json.decode(archive.read(_SPOOL), type=_Position)
                pictures = {name: archive.read(name) for name in archive.namelist() if _is_picture(name)}
                return Unsent(spool.id, spool.end, archive.read(_EVENTS), pictures)
        except (zipfile.BadZipFile, KeyError, msgspec.DecodeError) as error:
            LOG.warning("%s is damaged and removed; the events in it are lost (%s)", self.url, one_line(error))
            self.remove()
            return None

    def write(self, unsent: Unsent) -> None:
        """Replace the object."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(_SPOOL, msgspec.json.encode(_Position(unsent.spool, unsent.end)))
            archive.writestr(_EVENTS, unsent.lines, zipfile.ZIP_DEFLATED, compresslevel=1)
            for name, picture in unsent.pictures.items():
                archive.writestr(name, picture)
        storage.write(self.url, buffer.getvalue())

    def exists(self) -> bool:
        """Return whether anything is kept."""
        return storage.exists(self.url)

    def remove(self) -> None:
        """Delete the object if there is one."""
        storage.remove(self.url)


class _Position(msgspec.Struct):
    id: str
    end: int


def _is_picture(name: str) -> bool:
    return name.endswith((".png", CONTENT)) and PurePath(name).name == name


class Keeper:
    """Writer of a spool's unsent events to their object; `kept` says whether there is one already.

    Any thread may call it, while the spool is appended to and sent. What was sent is not read again.
    """

    def __init__(self, spool: SpoolFolder, target: UnsentObject, kept: bool) -> None:
        self._spool, self._target, self._kept = spool, target, kept
        self._lock = threading.Lock()
        self._last: tuple[int, int] | None = None

    def __call__(self, end: int, in_memory: bytes = b"") -> None:
        """Keep what was not sent of the events up to `end` and of those in memory; raise what the store raises."""
        with self._lock:
            start, position = self._spool.sent, end + len(in_memory)
            if start >= position:
                if self._kept:
                    self._target.remove()
                self._kept, self._last = False, None
            elif (start, position) != self._last:
                self._kept, self._last = True, None  # also if the store has written it and then raises
                self._target.write(self._unsent(start, end, in_memory))
                self._last = (start, position)

    def superseded(self) -> bool:
        """Return whether another node has taken over what was kept."""
        unsent = self._target.read()
        return unsent is not None and unsent.spool != self._spool.id

    def _unsent(self, start: int, end: int, in_memory: bytes) -> Unsent:
        lines = self._spool.read(start, end) + in_memory
        pictures = {}
        with_pictures = [line for line in lines.splitlines() if b'"file"' in line]  # decoding all takes seconds
        for event in decode(with_pictures, self._spool.events):
            if event.kind in ("picture", "file"):
                try:
                    pictures[event.tags["file"]] = (self._spool.path / event.tags["file"]).read_bytes()
                except FileNotFoundError:
                    continue  # sent meanwhile
        return Unsent(self._spool.id, end + len(in_memory), lines, pictures)


def open_spool(spool: SpoolFolder, target: UnsentObject) -> Keeper:
    """Make a spool ready for its writer and return its keeper; begin with what another node has kept, if any.

    The spool of this node is newer than its own object, unless a power loss took lines, and older than another's.
    """
    unsent = target.read()
    take_over = unsent is not None and (unsent.spool != spool.id or unsent.end > spool.size)
    if unsent is not None and take_over:
        spool.replace(unsent.lines, unsent.pictures)
    spool.create()
    keep = Keeper(spool, target, kept=unsent is not None)
    if take_over:
        keep(spool.size)  # in the name of this spool, so that the node that wrote it does not continue from its own
    return keep
