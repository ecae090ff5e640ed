"""Where a data set is written before it is one, and how it becomes one.

A local one is written into ``OUT.partial`` and renamed. A remote one is written where it will lie, each file from a
local copy that is whole, and its manifest last. Either way a *note* about every finished shard, which tells its digest,
lets a run that was stopped go on behind the last of them; the notes go when the data set is whole.
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

from shards import storage
from shards.defects import REPORT_NAME, SourceError
from shards.errors import ShardError
from shards.manifest import ANNOTATIONS_NAME, IMAGES_NAME, MANIFEST_NAME, SOURCE_NAME

_NOTES = ".partial"
_KEY = f"{_NOTES}/key"
# Seconds: a writer leaves a note with every shard, which takes less by far, and of those written at once the last are
# among the last by name.
YOUNG_S, _LAST_NOTES = 120.0, 64


@dataclass(frozen=True)
class Stage:
    """The folder or URL that is written into; ``key`` tells one data set from another. Goes to other processes."""

    url: str
    key: str

    def check_visible(self) -> None:
        """Raises ShardError where this process, on whatever machine, does not see the same folder."""
        try:
            found = storage.read(storage.join(self.url, _KEY))
        except OSError:
            found = b""
        if found == self.key.encode():
            return
        if found or storage.exists(storage.join(self.url, MANIFEST_NAME)):
            raise self._taken()
        raise ShardError(
            f"{self.url}: is not what it should be, seen from a worker on {socket.gethostname()}; expected images and "
            "--out to be visible from every process and node: give a shared folder or a URL"
        )

    def check_ours(self) -> None:
        """Raises ShardError where another process has taken a URL since; nothing locks one as ``flock`` does a folder."""
        if storage.local_path(self.url) is None and not self.is_ours():
            raise self._taken()

    def _taken(self) -> ShardError:
        return ShardError(
            f"{self.url}: another process has meanwhile begun or finished a data set there; expected to be alone: choose "
            "another place, or write one after the other"
        )

    def is_ours(self) -> bool:
        """Whether what is being written there is this data set."""
        try:
            return storage.read(storage.join(self.url, _KEY)) == self.key.encode()
        except FileNotFoundError:
            return False

    def read_note(self, name: str) -> bytes | None:
        """The note about a finished shard; None where it is not finished."""
        try:
            return storage.read(storage.join(self.url, _NOTES, f"{name}.json"))
        except FileNotFoundError:
            return None

    def write_note(self, name: str, content: bytes) -> None:
        """Mark a shard as finished, after everything of it is there."""
        self.check_ours()
        storage.write(storage.join(self.url, _NOTES, f"{name}.json"), content)

    @contextmanager
    def draft(self, name: str) -> Iterator["Draft"]:
        """A file to write into. It appears under ``name``, whole and flushed, if it was finished when the block ends."""
        local = storage.local_path(self.url)
        if local is None:
            # Without a name, so that a process that is killed leaves nothing on the disk.
            with tempfile.TemporaryFile() as file:
                draft = Draft(cast(BinaryIO, file))
                yield draft
                file.flush()
                if draft.finished:
                    self.check_ours()  # not to put it over one of theirs
                    storage.upload(Path(f"/proc/self/fd/{file.fileno()}"), storage.join(self.url, name))
            return
        # A name of its own, as Ray may try a shard again while the first try still goes on elsewhere.
        path = local / f".{name}.{socket.gethostname()}.{os.getpid()}"
        try:
            with path.open("wb") as file:
                draft = Draft(file)
                yield draft
                file.flush()
                os.fsync(file.fileno())
            if draft.finished:
                path.rename(local / name)
        finally:
            path.unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """A small file, whole or absent."""
        self.check_ours()
        storage.write(storage.join(self.url, name), content)


@dataclass
class Draft:
    """A file that is being written, and whether it is to be kept."""

    file: BinaryIO
    finished: bool = False


@contextmanager
def staging(out: str, key: str) -> Iterator[Stage]:
    """Where to write the data set ``out``, holding nothing but finished shards of the same ``key``; published at the end.

    An interruption leaves it for the next run of the same key; a source that is not sound removes it.
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
                f"{path}: is not empty and no run that was stopped has left it; expected no such folder, as it would be "
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
        shutil.rmtree(folder / _NOTES)  # last, as without its key the folder would not be taken for one of ours
    finally:
        os.close(descriptor)  # and with it the lock


@contextmanager
def _remote(out: str, key: str) -> Iterator[Stage]:
    stage = Stage(out, key)
    found = storage.listing(out)
    if found and _KEY not in found:
        raise ShardError(
            f"{out}: is not empty and holds no data set, expected a new or empty place: choose another one"
        )
    if found and not stage.is_ours():
        _check_left(out, sorted(name for name in found if name.startswith(f"{_NOTES}/")))
        _discard(stage)
    storage.write(storage.join(out, _KEY), key.encode())
    yield stage
    stage_files = [name for name in storage.listing(out) if name.startswith(f"{_NOTES}/")]
    for name in sorted(stage_files, key=lambda name: name == _KEY):  # the key last: it says whose the others are
        storage.remove(storage.join(out, name))


def _check_left(out: str, notes: list[str]) -> None:
    """Raises ShardError where another data set is perhaps being written right now: the last of its notes is young."""
    age_s = min(storage.age_s(storage.join(out, name)) for name in {_KEY, *notes[-_LAST_NOTES:]})
    if age_s < YOUNG_S:
        raise ShardError(
            f"{out}: another data set was being written there {max(age_s, 0):.0f} s ago; if that goes on, choose another "
            f"place; if it was stopped, try again in {YOUNG_S - age_s:.0f} s"
        )


def _discard(stage: Stage) -> None:
    """Remove everything that was written, and nothing that was not."""
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
    """Remove what is not worth keeping: of a killed run, half-written files above all."""
    for entry in path.iterdir():
        if kept(entry):
            continue
        with suppress(FileNotFoundError):  # another try of the same shard may end right now
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
