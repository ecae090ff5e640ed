"""Stage a data set while it is written, and publish it when it is complete.

A local data set is written into `OUT.partial`, which is then renamed. A remote one is written to its final URL, each
file from a complete local copy, and its manifest last. In both cases a *note* for every finished shard, with its
digest, lets a stopped run continue after the last of them; the notes are removed when the data set is complete.
"""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from shards.dataset.manifest import ANNOTATIONS_NAME, IMAGES_NAME, MANIFEST_NAME, SOURCE_NAME
from shards.errors import ShardError
from shards.source.defects import SourceError
from shards.source.report import REPORT_NAME
from shards.store import storage

_NOTES = ".partial"
_KEY = f"{_NOTES}/key"
# A writer whose newest note is younger than this many seconds may still be running: a shard takes far less.
YOUNG_S = 120.0
# Shards are written several at a time, so the newest note is among the last by name.
_LAST_NOTES = 64


@dataclass(frozen=True)
class Stage:
    """The folder or URL that is written to; `key` identifies the data set. Picklable."""

    url: str
    key: str

    def check_visible(self) -> None:
        """Raise `ShardError` if this process, maybe on another machine, does not see the same folder."""
        try:
            found = storage.read(storage.join(self.url, _KEY))
        except OSError:
            found = b""
        if found == self.key.encode():
            return
        if found or storage.exists(storage.join(self.url, MANIFEST_NAME)):
            raise self._taken()
        raise ShardError(
            f"{self.url}: a worker on {socket.gethostname()} sees another folder, or none; expected images and "
            "--out to be visible from every process and node: give a shared folder or a URL"
        )

    def check_ours(self) -> None:
        """Raise `ShardError` if another process has taken the URL since; a URL cannot be locked like a folder."""
        if storage.local_path(self.url) is None and not self.is_ours():
            raise self._taken()

    def _taken(self) -> ShardError:
        return ShardError(
            f"{self.url}: another process has started or finished a data set there; expected no other writer: choose "
            "another folder or URL, or write one after the other"
        )

    def is_ours(self) -> bool:
        """Return true if the data set that is being written there is this one."""
        try:
            return storage.read(storage.join(self.url, _KEY)) == self.key.encode()
        except FileNotFoundError:
            return False

    def read_note(self, name: str) -> bytes | None:
        """Return the note of a finished shard; None when it is not finished."""
        try:
            return storage.read(storage.join(self.url, _NOTES, f"{name}.json"))
        except FileNotFoundError:
            return None

    def write_note(self, name: str, content: bytes) -> None:
        """Mark a shard as finished; call it after the shard itself is stored."""
        self.check_ours()
        storage.write(storage.join(self.url, _NOTES, f"{name}.json"), content)

    @contextmanager
    def draft(self, name: str) -> Iterator["Draft"]:
        """Yield a file to write; if finished when the block ends, it appears under `name`, complete and flushed."""
        local = storage.local_path(self.url)
        if local is None:
            # An unnamed file, so that a killed process leaves nothing on the disk.
            with tempfile.TemporaryFile() as file:
                draft = Draft(cast(BinaryIO, file))
                yield draft
                file.flush()
                if draft.finished:
                    self.check_ours()  # do not overwrite another writer's shard
                    storage.upload(Path(f"/proc/self/fd/{file.fileno()}"), storage.join(self.url, name))
            return
        # The temporary file is this process's own: Ray may retry a shard while the first attempt runs elsewhere.
        with suppress(_Unfinished), storage.atomic_path(local / name) as path, path.open("wb") as file:
            draft = Draft(file)
            yield draft
            if not draft.finished:
                raise _Unfinished

    def write(self, name: str, content: bytes) -> None:
        """Write a small file; it is complete or absent."""
        self.check_ours()
        storage.write(storage.join(self.url, name), content)


class _Unfinished(Exception):
    """Raised to leave out a draft that is not to be kept."""


@dataclass
class Draft:
    """A file that is being written; it is kept only if `finished`."""

    file: BinaryIO
    finished: bool = False


@contextmanager
def staging(out: str, key: str) -> Iterator[Stage]:
    """Yield a stage for the data set `out` that holds only finished shards of the same `key`; publish it at the end.

    An interruption leaves it for the next run of the same key; a `SourceError` removes it.
    """
    folder = storage.local_path(out)
    opened = _remote(out, key) if folder is None else _local(folder, key)
    with opened as stage:
        try:
            yield stage
        except SourceError:
            if folder is not None or stage.is_ours():
                _discard(stage)
            raise


@contextmanager
def _local(folder: Path, key: str) -> Iterator[Stage]:
    path = folder.with_name(folder.name + ".partial")
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{folder}: another process is writing it right now: wait for it or stop it") from None
        key_file = path / _KEY
        if not key_file.exists() and any(entry.name != _NOTES for entry in path.iterdir()):
            raise ShardError(
                f"{path}: is not empty and was not left by a stopped run; expected no such folder, as it would be "
                "cleared: move it away or choose another --out"
            )
        same = key_file.exists() and key_file.read_text() == key
        _clear(path, lambda entry: same and (entry.suffix == ".tar" or entry.name == _NOTES))
        stage = Stage(str(path), key)
        stage.write(_KEY, key.encode())
        yield stage
        _clear(path, lambda entry: not entry.name.startswith(".") or entry.name == _NOTES)
        _clear(path / _NOTES, lambda entry: entry == key_file)
        for entry in path.iterdir():
            if entry.is_dir():
                storage.sync_folder(entry)
        storage.sync_folder(path)
        path.rename(folder)
        storage.sync_folder(folder.parent)
        shutil.rmtree(folder / _NOTES)  # last: without the key in it, the folder would not be recognised as ours
    finally:
        os.close(descriptor)  # releases the lock


@contextmanager
def _remote(out: str, key: str) -> Iterator[Stage]:
    stage = Stage(out, key)
    found = storage.listing(out)
    if found and _KEY not in found:
        raise ShardError(f"{out}: is not empty and holds no data set, expected a new or empty URL: choose another one")
    if found and not stage.is_ours():
        _check_left(out, sorted(name for name in found if name.startswith(f"{_NOTES}/")))
        _discard(stage)
    storage.write(storage.join(out, _KEY), key.encode())
    yield stage
    stage_files = [name for name in storage.listing(out) if name.startswith(f"{_NOTES}/")]
    for name in sorted(stage_files, key=lambda name: name == _KEY):  # the key last: it identifies the others
        storage.remove(storage.join(out, name))


def _check_left(out: str, notes: list[str]) -> None:
    """Raise `ShardError` if another data set may be being written right now: its newest note is young."""
    age_s = min(storage.age_s(storage.join(out, name)) for name in {_KEY, *notes[-_LAST_NOTES:]})
    if age_s < YOUNG_S:
        raise ShardError(
            f"{out}: another data set was being written there {max(age_s, 0):.0f} s ago; if it still is, choose "
            f"another URL; if it was stopped, try again in {YOUNG_S - age_s:.0f} s"
        )


def _discard(stage: Stage) -> None:
    """Remove all files that the writer has written, and no others."""
    path = storage.local_path(stage.url)
    if path is not None:
        shutil.rmtree(path)
        return
    ours = {REPORT_NAME, SOURCE_NAME, IMAGES_NAME, ANNOTATIONS_NAME, MANIFEST_NAME}
    names = [
        name
        for name in storage.listing(stage.url)
        if name in ours or name.startswith(f"{_NOTES}/") or (name.startswith("shard-") and name.endswith(".tar"))
    ]
    for name in sorted(names, key=lambda name: name == _KEY):
        storage.remove(storage.join(stage.url, name))


def _clear(path: Path, kept: Callable[[Path], bool]) -> None:
    """Remove all entries that are not `kept`, such as half-written files of a killed run."""
    for entry in path.iterdir():
        if kept(entry):
            continue
        with suppress(FileNotFoundError):  # another attempt at the same shard may end right now
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
