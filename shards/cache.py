"""A folder on the node that keeps what was fetched from a store: each file is fetched once per node, whoever asks.

Files are named by the sha256 that the manifest gives them, so data sets never mix and one that moved is not fetched
again. A lock per file, which the kernel lets go of when its holder dies, makes the others wait for whoever fetches, or
take over from it. Its room (``shards.room``) is allocated on the disk before the first byte is asked for, so that nobody
else counts on it and a full disk shows at once.

Reading takes no lock but a shared one, for the moment of a read or as long as the file is mapped.
"""

import errno
import fcntl
import hashlib
import logging
import os
import time
import weakref
from pathlib import Path

import msgspec

from shards import storage
from shards.fetch import DigestError, Item, fetch
from shards.room import GIB, Room, hold, let_go, locked, unusable

LOG = logging.getLogger(__name__)

STAMP_S = 1.0  # how exactly it is noted when a file was last read
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
        self._room = Room(folder, limit)
        self._refused: dict[str, str] = {}
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._room.locked():
                pass
        except OSError as error:
            raise unusable(folder, error) from error

    def open(self, item: Item) -> int:
        """A descriptor of the whole file, fetched if need be; as long as it is open, the file is not evicted.

        Raises DigestError where the store holds something else, ShardError where it holds nothing or the disk has no
        room, and what ``shards.retry`` raises.
        """
        descriptor = self._whole(item)
        if descriptor is None:
            with locked(self._lock_of(item.sha256)):
                descriptor = self._whole(item)  # another was faster
                if descriptor is None:
                    descriptor = self._fetch_unless_refused(item)
        return descriptor

    def path(self, item: Item) -> Path:
        """Where the file is while it is open."""
        return self._folder / item.sha256

    def check(self, item: Item) -> None:
        """Drop the file if it is there and no longer what was fetched."""
        with locked(self._lock_of(item.sha256)):
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
        return self._room.total()

    def hold(self, item: Item, descriptor: int, user: object) -> None:
        """Keep an open file from being evicted as long as ``user`` lives, and close it then."""
        path = self.path(item)
        hold(path)
        weakref.finalize(user, let_go, path, descriptor)

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

    def _fetch_unless_refused(self, item: Item) -> int:
        """Under the file's lock, so that of many threads one finds out that the store holds something else."""
        if item.sha256 in self._refused:
            raise DigestError(self._refused[item.sha256])
        try:
            return self._fetch(item)
        except DigestError as error:
            self._refused[item.sha256] = str(error)
            raise

    def _fetch(self, item: Item) -> int:
        """Fetch under the file's lock; the file with a shared lock. Not synced: what a power cut leaves has another crc."""
        start = time.monotonic()
        part = self._folder / f"{item.sha256}.part"
        descriptor = self._room.reserve(part, item)
        try:
            fetch(item, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            part.replace(self.path(item))
        except BaseException as error:
            os.close(descriptor)
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
                raise unusable(self._folder, error) from error
            raise
        LOG.info("fetched %s: %d bytes in %.1f s", item.url, item.bytes, time.monotonic() - start)
        return descriptor
