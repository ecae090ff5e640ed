"""Space management of the cache folder, which many processes share: reservation and eviction.

The least recently read files are evicted first. Files that are being read, which a shared lock shows, are kept.
"""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from shards.errors import ShardError
from shards.store.download import Item
from shards.store.sizes import GIB, size_text

LOG = logging.getLogger(__name__)
SPARE = GIB // 2  # bytes of the disk that are left to other files, such as checkpoints
WAIT_S = 0.1  # between checks for space that other processes are about to release
PATIENCE_S = 10.0  # seconds of waiting before it is logged

# Files that this process maps into memory: waiting for their release would be waiting for itself.
_pinned: Counter[Path] = Counter()


class _CacheFile(NamedTuple):
    bytes: int
    last_read: float  # seconds since the epoch
    path: Path


class CacheSpace:
    """Space of a cache folder; `limit` is the maximum of all files together in bytes, 0 for the disk's free space."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    def locked(self) -> AbstractContextManager[None]:
        """Hold the lock of the folder, under which space is reserved and files are evicted."""
        return locked(self._folder / "room.lock")  # the name that other releases lock

    def capacity(self) -> int:
        """Return the maximum size in bytes of all files together: the limit, or what the disk allows."""
        files, partial_files = self._scan()
        free = self._free() + sum(file.bytes for file in files + partial_files)
        if self._limit:
            free = min(free, self._limit)
        return max(0, free)

    def reserve(self, partial: Path, item: Item) -> int:
        """Create the file `partial` with `item`'s size allocated on the disk, and return a descriptor of it.

        Wait if other processes are about to release enough space; raise `ShardError` if the file can never fit.
        """
        start, reported = time.monotonic(), False
        partial.unlink(missing_ok=True)  # left by a process that died during its download
        while True:
            with self.locked():
                if self._evict_for(item):
                    return self._create(partial, item.bytes)
            if not reported and time.monotonic() - start > PATIENCE_S:
                LOG.warning(
                    "%s: waiting for space for %s: all files there are being read or fetched; a larger --data.cache-gib "
                    "avoids this",
                    self._folder,
                    item.url,
                )
                reported = True
            time.sleep(WAIT_S)

    def _create(self, partial: Path, size: int) -> int:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _allocate(descriptor, size)
        except OSError as error:
            os.close(descriptor)
            partial.unlink()
            raise unusable(self._folder, error) from error
        return descriptor

    def _free(self) -> int:
        """Return the free bytes of the disk that the cache may use."""
        return shutil.disk_usage(self._folder).free - SPARE

    def _evict_for(self, item: Item) -> bool:
        """Evict files until `item` fits, under the folder's lock; false if other processes will release enough space.

        Raise `ShardError` if the file can never fit.
        """
        files, partial_files = self._scan()
        free = self._free()
        missing = item.bytes - free
        if self._limit:
            used = sum(file.bytes for file in files + partial_files)
            missing = max(missing, used + item.bytes - self._limit)
        in_use = 0
        for file in partial_files + sorted(files, key=lambda file: file.last_read):
            if missing <= 0:
                break
            if _evict(file.path):
                missing -= file.bytes
            elif file.path not in _pinned:
                in_use += file.bytes
        if missing <= 0:
            return True
        if missing <= in_use:
            return False
        limit = f" and a limit of {size_text(self._limit)}" if self._limit else ""
        raise ShardError(
            f"{self._folder}: no space for {item.url}: got {size_text(free + SPARE)} free on its disk{limit}, expected "
            f"{size_text(item.bytes)} and {size_text(SPARE)} in reserve: free some, raise --data.cache-gib, choose another "
            "folder with --data.cache DIR, or give --data.cache off"
        )

    def _scan(self) -> tuple[list[_CacheFile], list[_CacheFile]]:
        """Return the complete files, and those that are being fetched."""
        files: list[_CacheFile] = []
        partial_files: list[_CacheFile] = []
        for entry in os.scandir(self._folder):
            if entry.name.endswith(".lock"):
                continue
            try:
                status = entry.stat()
            except FileNotFoundError:  # completed or evicted meanwhile
                continue
            file = _CacheFile(status.st_size, status.st_mtime, Path(entry.path))
            if entry.name.endswith(".part"):
                partial_files.append(file)
            else:
                files.append(file)
        return files, partial_files


def pin(path: Path) -> None:
    """Record that this process keeps a file open, so that it does not wait for its release."""
    _pinned[path] += 1


def unpin(path: Path, descriptor: int) -> None:
    """Close a file that was recorded with `pin`."""
    _pinned[path] -= 1
    if not _pinned[path]:
        del _pinned[path]
    os.close(descriptor)


def _evict(path: Path) -> bool:
    """Remove a file unless it is being read or fetched; return true if it is gone."""
    lock = path.with_suffix(".lock") if path.suffix == ".part" else path
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        path.unlink(missing_ok=True)  # nothing, or a partial file whose lock file a user removed
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except (BlockingIOError, FileNotFoundError):  # in use, or its download was completed just now
        return False
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file in the block, after waiting for it; the kernel releases it if the process dies."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _allocate(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, max(1, size))
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not supported by the file system
            raise
    os.ftruncate(descriptor, size)


def unusable(folder: Path, error: OSError) -> ShardError:
    """Return the error for a cache folder that cannot be written."""
    return ShardError(
        f"{folder}: the cache cannot be written ({error.strerror or error}); expected a folder with free space on this "
        "node: free some, choose another folder with --data.cache DIR, or give --data.cache off"
    )
