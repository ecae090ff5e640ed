"""Object beside a run with the events that MLflow has not taken yet, in case the node with the spool is lost.

It is written before anything that will not be computed again is recorded (a checkpoint, its metrics), so that a spool
on another node can start from it: the events after it are computed again. It is a zip file, whole or absent:

    spool.json      id of the spool, the position in its events up to which the object is complete, and its files
    events.jsonl    events that were not sent

The files of events, pictures and artifacts, lie in a folder beside it. Each is written once, before the first object that
names it, so that a long outage does not write all of them again with every checkpoint.
"""

from __future__ import annotations

import io
import logging
import threading
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path, PurePath

import msgspec

from pipeline.run_folder import UNSENT_FILES
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
    """Object in the run's location; `url` is its address or path, and only one thread calls it at a time."""

    def __init__(self, url: str) -> None:
        self.url = url
        folder, _, name = url.rpartition("/")
        self._files = storage.join(folder, UNSENT_FILES, name.removesuffix(".zip"))
        self._stored: set[str] = set()
        """Names of files that are in the folder, as far as this process knows."""

    def kept_by(self) -> str:
        """Return the id of the spool that was kept, empty if there is none; its files are not read."""
        found = self._open()
        return found[0].id if found else ""

    def read(self, known: SpoolFolder | None = None) -> Unsent | None:
        """Return what was kept, or None; a damaged object is reported and removed.

        known: spool of this node. If it has all that was kept, no file is read.
        """
        found = self._open()
        if found is None:
            return None
        spool, lines, pictures = found
        if known is None or spool.id != known.id or spool.end > known.size:
            pictures |= self._read_files(spool.files)
        elif spool.files:
            self._stored |= set(spool.files.values()) & set(storage.listing(self._files))
        return Unsent(spool.id, spool.end, lines, pictures)

    def _open(self) -> tuple[_Position, bytes, dict[str, bytes]] | None:
        """Return position, events and pictures of the object itself, or None."""
        try:
            content = storage.read(self.url)
        except FileNotFoundError:
            return None
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                spool = msgspec.json.decode(archive.read(_SPOOL), type=_Position)
                # Earlier releases have the files in the object.
                pictures = {name: archive.read(name) for name in archive.namelist() if _is_picture(name)}
                return spool, archive.read(_EVENTS), pictures
        except (zipfile.BadZipFile, KeyError, msgspec.DecodeError) as error:
            LOG.warning("%s is damaged and removed; the events in it are lost (%s)", self.url, one_line(error))
            self.remove()
            return None

    def _read_files(self, names: Mapping[str, str]) -> dict[str, bytes]:
        """Return the contents of files by their names in the spool; one that is not there is left out."""
        found = {}
        for name, stored in names.items():
            if _is_picture(name) and _is_picture(stored):
                with suppress(FileNotFoundError):
                    found[name] = storage.read(storage.join(self._files, stored))
                    self._stored.add(stored)
        return found

    def write(self, spool: str, end: int, lines: bytes, files: Mapping[str, Path]) -> None:
        """Replace the object. `files`: those of the events by their names in the spool; one that is gone was sent."""
        listed = {}
        for name, path in files.items():
            stored = f"{spool}-{name}"  # the spools of two nodes may have files of the same name
            if stored not in self._stored:
                try:
                    content = path.read_bytes()
                except FileNotFoundError:
                    continue
                storage.write(storage.join(self._files, stored), content)
                self._stored.add(stored)
            listed[name] = stored
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr(_SPOOL, msgspec.json.encode(_Position(spool, end, listed)))
            archive.writestr(_EVENTS, lines, zipfile.ZIP_DEFLATED, compresslevel=1)
        storage.write(self.url, buffer.getvalue())
        for stored in self._stored - set(listed.values()):
            storage.remove(storage.join(self._files, stored))
            self._stored.remove(stored)

    def exists(self) -> bool:
        """Return whether anything is kept."""
        return storage.exists(self.url)

    def remove(self) -> None:
        """Delete the object if there is one, and its files."""
        storage.remove(self.url)
        for stored in storage.listing(self._files):
            storage.remove(storage.join(self._files, stored))
        self._stored.clear()
        local = storage.local_path(self._files)
        if local is not None:
            with suppress(OSError):  # not empty, or not there
                local.rmdir()
                local.parent.rmdir()


class _Position(msgspec.Struct):
    id: str
    end: int
    files: dict[str, str] = {}
    """Names in the folder of files, by their names in the spool."""


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
                lines = self._spool.read(start, end) + in_memory
                self._target.write(self._spool.id, position, lines, self._files(lines))
                self._last = (start, position)

    def superseded(self) -> bool:
        """Return whether another node has taken over what was kept."""
        return self._target.kept_by() not in ("", self._spool.id)

    def _files(self, lines: bytes) -> dict[str, Path]:
        """Return the paths of the files of events by their names."""
        with_files = [line for line in lines.splitlines() if b'"file"' in line]  # decoding all takes seconds
        events = decode(with_files, self._spool.events)
        names = [event.tags["file"] for event in events if event.kind in ("picture", "file")]
        return {name: self._spool.path / name for name in names}


def open_spool(spool: SpoolFolder, target: UnsentObject) -> Keeper:
    """Make a spool ready for its writer and return its keeper; begin with what another node has kept, if any.

    The spool of this node is newer than its own object, unless a power loss took lines, and older than another's.
    """
    unsent = target.read(spool)
    take_over = unsent is not None and (unsent.spool != spool.id or unsent.end > spool.size)
    if unsent is not None and take_over:
        spool.replace(unsent.lines, unsent.pictures)
    spool.create()
    keep = Keeper(spool, target, kept=unsent is not None)
    if take_over:
        keep(spool.size)  # in the name of this spool, so that the node that wrote it does not continue from its own
    return keep
