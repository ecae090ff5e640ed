"""Cache on the node of files from a remote store, shared by all processes: each file is fetched once per node.

Files are named by the sha256 in the manifest, so data sets do not collide and a moved data set is not fetched again.
Each file has a lock for its download. The other processes wait for it, and one of them continues if the holder dies,
because the kernel then releases the lock. Disk space is allocated before the first request, so that nobody else can
take it and a full disk is noticed at once.

Readers hold a shared lock on the file during a read, or as long as the file is mapped into memory.
"""

import errno
import fcntl
import hashlib
import logging
import os
import time
import weakref
from pathlib import Path

from shards.config import CacheConfig
from shards.store import storage
from shards.store.cache_space import CacheSpace, locked, pin, unpin, unusable
from shards.store.download import DigestError, Item, fetch
from shards.store.sizes import GIB

LOG = logging.getLogger(__name__)
STAMP_S = 1.0  # precision of the time of the last read
ENV_FOLDER = "DETR_CACHE"


def cache_for(url: str, config: CacheConfig) -> "Cache | None":
    """Return the cache for the data set at `url`, or None if it is read directly."""
    folder = config.folder
    if not folder and storage.local_path(url) is None:
        folder = os.environ.get(ENV_FOLDER, _home())
    if folder in ("", "off"):
        return None
    return Cache(Path(folder).expanduser(), int(config.gib * GIB))


def _home() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return os.path.join(base, "detr-cluster", "shards")


class Cache:
    """Cache folder; safe to share between threads and processes."""

    def __init__(self, folder: Path, limit: int = 0) -> None:
        """Create the folder; `limit` is the maximum of all files together in bytes, 0 for the disk's free space.

        Raise `ShardError` if the folder cannot be written.
        """
        self._folder = folder
        self._space = CacheSpace(folder, limit)
        self._refused: dict[str, str] = {}  # messages of files whose digest was wrong, by sha256
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._space.locked():
                pass
        except OSError as error:
            raise unusable(folder, error) from error

    def open(self, item: Item) -> int:
        """Return a descriptor of the file, fetched if necessary; while it is open, the file is not evicted.

        Raise `DigestError` if the store's file differs, `ShardError` if it is absent or does not fit on the disk, and
        `StoreError` if the store does not respond.
        """
        descriptor = self._open_complete(item)
        if descriptor is None:
            with locked(self._lock_of(item.sha256)):
                descriptor = self._open_complete(item)  # another process may have fetched it meanwhile
                if descriptor is None:
                    descriptor = self._fetch_unless_refused(item)
        return descriptor

    def path(self, item: Item) -> Path:
        """Return the path of the file; it is valid while the file is open."""
        return self._folder / item.sha256

    def check(self, item: Item) -> None:
        """Remove the file if it exists and its content has changed."""
        with locked(self._lock_of(item.sha256)):
            path = self.path(item)
            try:
                with path.open("rb") as file:
                    unchanged = hashlib.file_digest(file, "sha256").hexdigest() == item.sha256
            except FileNotFoundError:
                return
            except OSError:  # the disk cannot read it any more
                unchanged = False
            if not unchanged:
                LOG.warning("%s: changed on the disk; %s is fetched again", path, item.url)
                path.unlink(missing_ok=True)

    def capacity(self) -> int:
        """Return the maximum size in bytes of all files together: the limit, or what the disk allows."""
        return self._space.capacity()

    def keep_while_used(self, item: Item, descriptor: int, user: object) -> None:
        """Keep an open file in the cache until `user` is garbage-collected, then close it."""
        path = self.path(item)
        pin(path)
        weakref.finalize(user, unpin, path, descriptor)

    def __str__(self) -> str:
        return str(self._folder)

    def _lock_of(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.lock"

    def _open_complete(self, item: Item) -> int | None:
        """Return a descriptor of the file with a shared lock, or None if it is absent or truncated."""
        try:
            descriptor = os.open(self.path(item), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        status = os.fstat(descriptor)
        if status.st_size != item.bytes:
            os.close(descriptor)
            return None
        if time.time() - status.st_mtime > STAMP_S:
            os.utime(descriptor)  # the time of the last read, by which files are evicted
        return descriptor

    def _fetch_unless_refused(self, item: Item) -> int:
        """Fetch under the file's lock; raise `DigestError` at once if an earlier fetch did."""
        if item.sha256 in self._refused:
            raise DigestError(self._refused[item.sha256])
        try:
            return self._fetch(item)
        except DigestError as error:
            self._refused[item.sha256] = str(error)
            raise

    def _fetch(self, item: Item) -> int:
        """Fetch under the file's lock and return a descriptor with a shared lock.

        The file is not flushed to the disk: after a power failure its crc would not match, and it is fetched again.
        """
        start = time.monotonic()
        partial = self._folder / f"{item.sha256}.part"
        descriptor = self._space.reserve(partial, item)
        try:
            fetch(item, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            partial.replace(self.path(item))
        except BaseException as error:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise unusable(self._folder, error) from error
            raise
        LOG.info("fetched %s: %d bytes in %.1f s", item.url, item.bytes, time.monotonic() - start)
        return descriptor
