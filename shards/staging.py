"""The folder beside a data set in which it is written before it gets its name."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards import storage
from shards.errors import ShardError

_KEY_NAME = ".key"


@contextmanager
def staging(folder: Path, key: str) -> Iterator[Path]:
    """The folder to write into: locked, and holding nothing but finished shards of the same ``key``.

    An interruption leaves it for the next run of the same key; a ShardError removes it.
    """
    path = folder.with_name(folder.name + ".partial")
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{folder}: another process is writing it right now: wait for it or stop it") from None
        key_file = path / _KEY_NAME
        _clear(path, keep_shards=key_file.exists() and key_file.read_text() == key)
        storage.write_atomic(key_file, key.encode())
        try:
            yield path
        except ShardError:
            shutil.rmtree(path)
            raise
    finally:
        os.close(descriptor)  # and with it the lock


def publish(path: Path, folder: Path) -> None:
    """Give the finished folder its name, durably."""
    (path / _KEY_NAME).unlink()
    path.rename(folder)
    storage.sync_folder(folder.parent)


def _clear(path: Path, keep_shards: bool) -> None:
    """Remove what a killed run left, half-written files above all; finished shards are worth keeping."""
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif not (keep_shards and entry.suffix == ".tar"):
            entry.unlink()
