"""Room for files in a folder that any number of processes and threads share, and who may take it from whom.

Nothing is evicted that somebody reads, which a shared lock on the file says; what was least recently read goes first.
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

from shards.errors import ShardError
from shards.fetch import Item

LOG = logging.getLogger(__name__)

GIB = 1 << 30
SPARE = GIB // 2  # bytes of the disk that are left to others, such as checkpoints
WAIT_S = 0.1  # between looks for room that others are about to give back
PATIENCE_S = 10.0  # before it is said that there is nothing but waiting

# Files that this process maps: waiting for them to be free would be waiting for itself.
_held: Counter[Path] = Counter()


class Room:
    """What the files of a folder may take together."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit

    def locked(self) -> AbstractContextManager[None]:
        """The lock of the folder, under which room is made and taken."""
        return locked(self._folder / "room.lock")

    def total(self) -> int:
        """Bytes that all files together may take: the limit, or what is free besides them."""
        files, parts = self._scan()
        free = shutil.disk_usage(self._folder).free - SPARE + sum(size for size, _, _ in files + parts)
        return max(0, min(free, self._limit or free))

    def reserve(self, part: Path, item: Item) -> int:
        """A descriptor of a new file that has its room on the disk, after waiting for it where others are reading.

        Raises ShardError where there is no room for it, nor will be.
        """
        start, said = time.monotonic(), False
        part.unlink(missing_ok=True)  # of one that died over it
        while True:
            with self.locked():
                if self._make_room(item):
                    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    try:
                        _allocate(descriptor, item.bytes)
                    except OSError as error:
                        os.close(descriptor)
                        part.unlink()
                        raise unusable(self._folder, error) from error
                    return descriptor
            if not said and time.monotonic() - start > PATIENCE_S:
                LOG.warning(
                    "%s: waiting for room for %s: what is there is being read or fetched; a larger --data.cache-gib waits less",
                    self._folder,
                    item.url,
                )
                said = True
            time.sleep(WAIT_S)

    def _make_room(self, item: Item) -> bool:
        """Evict until ``item`` fits; False where others are about to give room back. Under the folder's lock."""
        files, parts = self._scan()
        free = shutil.disk_usage(self._folder).free - SPARE
        used = sum(size for size, _, _ in files + parts)
        short = max(item.bytes - free, used + item.bytes - self._limit if self._limit else 0)
        busy = 0
        for size, _, path in parts + sorted(files, key=lambda file: file[1]):
            if short <= 0:
                break
            if _evict(path):
                short -= size
            elif path not in _held:
                busy += size
        if short <= 0:
            return True
        if short <= busy:
            return False
        limit = f" and a limit of {size_text(self._limit)}" if self._limit else ""
        raise ShardError(
            f"{self._folder}: no room for {item.url}: got {size_text(free + SPARE)} free on its disk{limit}, expected "
            f"{size_text(item.bytes)} and {size_text(SPARE)} that are left to others: free some, raise --data.cache-gib, give another "
            "--data.cache DIR, or --data.cache off"
        )

    def _scan(self) -> tuple[list[tuple[int, float, Path]], list[tuple[int, float, Path]]]:
        """(bytes, last read, path) of the files, and of those that are being fetched."""
        files: list[tuple[int, float, Path]] = []
        parts: list[tuple[int, float, Path]] = []
        for entry in os.scandir(self._folder):
            if not entry.name.endswith(".lock"):
                try:
                    status = entry.stat()
                except FileNotFoundError:  # finished or evicted meanwhile
                    continue
                found = (status.st_size, status.st_mtime, Path(entry.path))
                (parts if entry.name.endswith(".part") else files).append(found)
        return files, parts


def hold(path: Path) -> None:
    """Say that this process keeps a file open for long."""
    _held[path] += 1


def let_go(path: Path, descriptor: int) -> None:
    """Close a file that was held."""
    _held[path] -= 1
    if not _held[path]:
        del _held[path]
    os.close(descriptor)


def _evict(path: Path) -> bool:
    """Remove a file unless it is being read, or a half-fetched one unless its fetcher lives."""
    held = path.with_suffix(".lock") if path.suffix == ".part" else path
    try:
        descriptor = os.open(held, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        path.unlink(missing_ok=True)  # a half-fetched file whose lock a person removed, or nothing
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except (BlockingIOError, FileNotFoundError):  # in use, or it became a whole file just now
        return False
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, after waiting for it; whoever dies lets go of it."""
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
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # some file systems cannot
            raise
    os.ftruncate(descriptor, size)


def unusable(folder: Path, error: OSError) -> ShardError:
    """What to say of a folder that cannot be written."""
    return ShardError(
        f"{folder}: the cache cannot be written ({error.strerror or error}); expected a folder with room on this node: "
        "free some, give another --data.cache DIR, or --data.cache off"
    )


def size_text(size: int) -> str:
    """Bytes as people say them, close enough to tell two of them apart."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size} bytes"
