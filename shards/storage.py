"""Local paths and remote URLs behind the same few functions.

Local files go straight through the operating system (a ranged read is one ``pread``); everything with another
``scheme://`` goes through fsspec. Writing is local only: a data set is published by renaming a folder, which object
stores do not have.
"""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import fsspec

from shards.errors import ShardError

# Enough for every shard of COCO (120) and far below the usual limit of 1,024 open files, of which several loaders
# in one process take their share.
OPEN_FILES = 128


def local_path(url: str) -> Path | None:
    """The path that a plain path or a ``file://`` URL names, or None for a remote URL."""
    if url.startswith("file://"):
        return Path(url[len("file://") :])
    return None if "://" in url else Path(url)


def _remote(url: str) -> tuple[Any, str]:
    """The file system of a remote URL and the name in it; raises ShardError where fsspec has none for it."""
    try:
        filesystem, name = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url}: cannot be reached: {error}; expected a path or a URL that fsspec can open") from None
    return filesystem, name


def absolute(url: str) -> str:
    """A local path made absolute; a remote URL without its last slashes."""
    path = local_path(url)
    return url.rstrip("/") if path is None else str(path.absolute())


def join(url: str, *parts: str) -> str:
    """``url`` with ``parts`` appended, each after one slash."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    path = local_path(url)
    if path is not None:
        return path.exists()
    filesystem, name = _remote(url)
    return bool(filesystem.exists(name))


def size(url: str) -> int:
    """Bytes of the file at ``url``; raises FileNotFoundError where there is none."""
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    filesystem, name = _remote(url)
    return int(filesystem.size(name))


def read(url: str) -> bytes:
    """The whole file; raises FileNotFoundError where there is none."""
    path = local_path(url)
    if path is not None:
        return path.read_bytes()
    filesystem, name = _remote(url)
    return bytes(filesystem.cat_file(name))


def download(url: str, path: Path) -> None:
    """Copy the file at ``url`` to a local path, piece by piece."""
    filesystem, name = _remote(url)
    filesystem.get_file(name, str(path))


def write_atomic(path: Path, content: bytes) -> None:
    """Write a local file aside, flush it to the disk and rename it, so that it is whole or absent."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sync_folder(path: Path) -> None:
    """Make the renames inside a local folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _OpenFile:
    """A file descriptor that is closed when its last user lets go of it, even after it left the reader's table."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class RangeReader:
    """Reads byte ranges of many files, from many threads, with a bounded number of open files."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, url: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; fewer only where the file ends before.

        Raises ShardError where the file is absent.
        """
        try:
            path = local_path(url)
            if path is None:
                filesystem, name = _remote(url)
                return bytes(filesystem.cat_file(name, start=offset, end=offset + length))
            file = self._open(url, path)
        except FileNotFoundError:
            raise ShardError(
                f"{url}: no such file; the manifest lists it: copy it back or write the data set again"
            ) from None
        # `file` keeps the descriptor alive here, also when another thread evicts it meanwhile.
        return os.pread(file.descriptor, length, offset)

    def close(self) -> None:
        """Let go of every open file."""
        with self._lock:
            self._files.clear()

    def _open(self, url: str, path: Path) -> _OpenFile:
        with self._lock:
            file = self._files.get(url)
            if file is None:
                file = self._files[url] = _OpenFile(path)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(url)
            return file
