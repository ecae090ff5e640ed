"""A folder on the node that keeps what was fetched from a store: each file is fetched once per node, whoever asks.

Files are named by the sha256 that the manifest gives them, so data sets never mix and one that moved is not fetched
again. A lock per file, which the kernel lets go of when its holder dies, makes the others wait for whoever fetches, or
take over from it. A second lock, of the folder, is held while room is made; the room is allocated on the disk before the
first byte is asked for, so that nobody else counts on it and a full disk shows at once.

Reading takes no lock but a shared one for the moment of a read, against which nothing is evicted. What was least
recently read goes first.
"""

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from shards import storage
from shards.errors import ShardError
from shards.fetch import Item, fetch

LOG = logging.getLogger(__name__)

GIB = 1 << 30
SPARE = GIB // 2  # bytes of the disk that are left to others, such as checkpoints
STAMP_S = 1.0  # how exactly it is noted when a file was last read
WAIT_S = 0.1  # between looks for room that others are about to give back
ENV_FOLDER = "DETR_CACHE"


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where files are kept on the node, and how much of them.

    folder: a folder; "off" to ask the store for every sample; empty for the folder that DETR_CACHE names, or one below
    the home folder, for remote data sets and nothing for local ones.
    gib: at most so many GiB; 0 for as much as the disk has room for.
    """

    folder: str = ""
    gib: float = 0.0


def cache_for(url: str, config: CacheConfig) -> "Cache | None":
    """The cache for the data set at ``url``, or None where it is read where it lies."""
    folder = config.folder or ("" if storage.local_path(url) is not None else os.environ.get(ENV_FOLDER, _home()))
    return None if folder in ("", "off") else Cache(Path(folder).expanduser(), int(config.gib * GIB))


def _home() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(base, "detr-cluster", "shards")


class Cache:
    """Files in a folder that any number of processes and threads share."""

    def __init__(self, folder: Path, limit: int = 0) -> None:
        """``limit``: bytes that its files may take together; 0 for no limit but the disk's. Makes the folder.

        Raises ShardError where the folder cannot be written.
        """
        self._folder = folder
        self._limit = limit
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(folder / "room.lock"):
                pass
        except OSError as error:
            raise _unusable(folder, error) from error

    def open(self, item: Item) -> int:
        """A descriptor of the whole file, fetched if need be; as long as it is open, the file is not evicted.

        Raises DigestError where the store holds something else, ShardError where it holds nothing or the disk has no
        room, and what ``shards.retry`` raises.
        """
        descriptor = self._whole(item)
        if descriptor is None:
            with _locked(self._lock_of(item.sha256)):
                descriptor = self._whole(item)  # another was faster
                if descriptor is None:
                    descriptor = self._fetch(item)
        return descriptor

    def path(self, item: Item) -> Path:
        """Where the file is while it is open."""
        return self._folder / item.sha256

    def check(self, item: Item) -> None:
        """Drop the file if it is there and no longer what was fetched."""
        with _locked(self._lock_of(item.sha256)):
            path = self.path(item)
            try:
                with path.open("rb") as file:
                    same = hashlib.file_digest(file, "sha256").hexdigest() == item.sha256
            except FileNotFoundError:
                return
            except OSError:  # the disk cannot read it any more
                same = False
            if not same:
                LOG.warning("%s: changed on the disk; %s is fetched again", path, item.url)
                path.unlink(missing_ok=True)

    def room(self) -> int:
        """Bytes that all files together may take: the limit, or what is free besides them."""
        files, parts = self._scan()
        free = shutil.disk_usage(self._folder).free - SPARE + sum(size for size, _, _ in files + parts)
        return max(0, min(free, self._limit or free))

    def __str__(self) -> str:
        return str(self._folder)

    def _lock_of(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.lock"

    def _whole(self, item: Item) -> int | None:
        """A descriptor of the file with a shared lock, or None where it is absent or cut off."""
        try:
            descriptor = os.open(self.path(item), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        found = os.fstat(descriptor)
        if found.st_size != item.bytes:
            os.close(descriptor)
            return None
        if time.time() - found.st_mtime > STAMP_S:
            os.utime(descriptor)
        return descriptor

    def _fetch(self, item: Item) -> int:
        """Fetch under the file's lock; the file with a shared lock. Not synced: what a power cut leaves has another crc."""
        start = time.monotonic()
        part = self._folder / f"{item.sha256}.part"
        descriptor = self._reserve(part, item)
        try:
            fetch(item, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            part.replace(self.path(item))
        except BaseException as error:
            os.close(descriptor)
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise _unusable(self._folder, error) from error
            raise
        LOG.info("fetched %s: %d bytes in %.1f s", item.url, item.bytes, time.monotonic() - start)
        return descriptor

    def _reserve(self, part: Path, item: Item) -> int:
        """A descriptor of a new file that has its room on the disk."""
        part.unlink(missing_ok=True)  # of one that died over it
        while True:
            with _locked(self._folder / "room.lock"):
                if self._make_room(item):
                    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    try:
                        _allocate(descriptor, item.bytes)
                    except OSError as error:
                        os.close(descriptor)
                        part.unlink()
                        raise _unusable(self._folder, error) from error
                    return descriptor
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
            else:
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


def _evict(path: Path) -> bool:
    """Remove a file unless it is being read, or a half-fetched one unless its fetcher lives."""
    held = path.with_suffix(".lock") if path.suffix == ".part" else path
    try:
        descriptor = os.open(held, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
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
def _locked(path: Path) -> Iterator[None]:
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


def _unusable(folder: Path, error: OSError) -> ShardError:
    return ShardError(
        f"{folder}: the cache cannot be written ({error.strerror or error}); expected a folder with room on this node: "
        "free some, give another --data.cache DIR, or --data.cache off"
    )


def size_text(size: int) -> str:
    """Bytes as people say them, close enough to tell two of them apart."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size} bytes"
