"""What reads byte ranges of a data set's files, from many threads: where they lie, or from the cache."""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from shards import storage
from shards.cache import Cache
from shards.fetch import DigestError, Item

LOG = logging.getLogger(__name__)

# Enough for every shard of COCO (120) and far below the usual limit of 1,024 open files, of which several loaders
# in one process take their share.
OPEN_FILES = 128


class Files(Protocol):
    """What reads byte ranges of a data set's files, from many threads."""

    def read(self, url: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; fewer only where the file ends before. Raises ShardError where it is absent."""

    def forget(self, url: str) -> None:
        """What came from ``url`` is not what was written: take no copy of it for good that has changed."""

    def close(self) -> None:
        """Let go of every open file."""


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

        Raises ShardError where the file is absent or no file that may be read, OSError, naming it, where trying again
        may mend it.
        """
        try:
            path = storage.local_path(url)
            if path is None:
                return storage.read_range(url, offset, length)
            with storage.naming(url):
                file = self._open(url, path)
                # `file` keeps the descriptor alive here, also when another thread evicts it meanwhile.
                return os.pread(file.descriptor, length, offset)
        except FileNotFoundError:
            raise storage.absent(url) from None

    def forget(self, url: str) -> None:
        """Open the file anew when it is next read: another may have taken its place."""
        with self._lock:
            self._files.pop(url, None)

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


class CachedReader:
    """Reads byte ranges of files that the cache keeps."""

    def __init__(self, cache: Cache, items: Iterable[Item], *, lenient: bool = False) -> None:
        """``lenient``: read past the cache, range by range, what the store no longer holds as it was written."""
        self._cache = cache
        self._items = {item.url: item for item in items}
        self._lenient = lenient
        self._past: set[str] = set()

    def read(self, url: str, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``; fewer only where the file ends before. Raises what ``Cache.open`` does."""
        descriptor = None if url in self._past else self._open(url)
        if descriptor is None:
            try:
                return storage.read_range(url, offset, length)
            except FileNotFoundError:
                raise storage.absent(url) from None
        try:
            with storage.naming(f"{url}, as kept in {self._cache}"):
                return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def forget(self, url: str) -> None:
        """Drop the copy if it changed on the disk."""
        self._cache.check(self._items[url])

    def close(self) -> None:
        """Nothing is open between reads."""

    def _open(self, url: str) -> int | None:
        try:
            return self._cache.open(self._items[url])
        except DigestError as error:
            if not self._lenient:
                raise
            LOG.warning("%s; its samples are read one by one", error)
            self._past.add(url)
            return None
