"""Helpers to read files and data sets through a cache, and to list its files."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.config import CacheConfig
from shards.dataset.manifest import Manifest, load_manifest
from shards.store.cache import Cache
from shards.store.download import Item


def content(cache: Cache, item: Item) -> bytes:
    """Return a file's content, read through the cache."""
    with os.fdopen(cache.open(item), "rb") as file:
        return file.read()


def names(folder: Path) -> list[str]:
    """Return the names of the files in a cache folder, partial ones included."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def read_at_once(count: int, act: Callable[[int], object]) -> None:
    """Call `act` with its number in each of `count` threads; none may raise an error."""
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            act(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


def kept(coco: Any, tmp_path: Path, **config: Any) -> Manifest:
    """Return the small data set, read through a cache."""
    coco.write(samples_per_shard=3, **config)
    manifest = load_manifest(coco.root / "out", CacheConfig(str(tmp_path / "kept")))
    manifest.index()
    return manifest
