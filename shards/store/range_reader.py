"""Readers of byte ranges of a data set's files, directly or through the cache; safe to share between threads."""

import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from shards.store import storage
from shards.store.cache import Cache
from shards.store.download import DigestError, Item

LOG = logging.getLogger(__name__)

# Enough for every shard of COCO (120), and far below the usual limit of 1,024 open files, which several loaders in one
# process share.
OPEN_FILES = 128


class RangeSource(Protocol):
    """Interface of the readers."""

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only at the file's end; raise `ShardError` if it is absent."""

    def invalidate(self, url: str) -> None:
        """Invalidate `url`, because its bytes failed a check: reopen it, or check the cached copy."""

    def close(self) -> None:
        """Close all open files."""


class _OpenFile:
    """File descriptor that is closed with its last reference, also after the reader has dropped it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1  # for `__del__`, if `os.open` raises
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class RangeReader:
    """Reader of local and remote files that keeps at most `OPEN_FILES` of them open."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only at the end of the file.

        Raise `ShardError` if the file is absent or not readable, and `OSError`, naming it, if a retry may succeed.
        """
        try:
            path = storage.local_path(url)
            if path is None:
                return storage.read_range(url, offset, length)
            with storage.error_context(url):
                file = self._open(url, path)
                # `file` keeps the descriptor open here, even if another thread drops it from the table meanwhile.
                return os.pread(file.descriptor, length, offset)
        except FileNotFoundError:
            raise storage.missing_file_error(url) from None

    def invalidate(self, url: str) -> None:
        """Reopen the file at its next read: it may have been replaced."""
        with self._lock:
            self._files.pop(url, None)

    def close(self) -> None:
        """Close all open files."""
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
    """Reader of files through the cache."""

    def __init__(self, cache: Cache, items: Iterable[Item], *, lenient: bool = False) -> None:
        """Read `items` through `cache`; `lenient` reads a file with a wrong digest directly, instead of failing."""
        self._cache = cache
        self._items = {item.url: item for item in items}
        self._lenient = lenient
        self._uncached: set[str] = set()

    def read(self, url: str, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`, fewer only at the end of the file; raise as `Cache.open`."""
        descriptor = None if url in self._uncached else self._open(url)
        if descriptor is None:
            try:
                return storage.read_range(url, offset, length)
            except FileNotFoundError:
                raise storage.missing_file_error(url) from None
        try:
            with storage.error_context(f"{url}, as kept in {self._cache}"):
                return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def invalidate(self, url: str) -> None:
        """Remove the cached copy if it changed on the disk."""
        self._cache.check(self._items[url])

    def close(self) -> None:
        """Do nothing: no file is open between reads."""

    def _open(self, url: str) -> int | None:
        try:
            return self._cache.open(self._items[url])
        except DigestError as error:
            if not self._lenient:
                raise
            LOG.warning("%s; its samples are read one by one", error)
            self._uncached.add(url)
            return None
