"""Reading files and data sets through a cache, and looking at what it keeps."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.cache import Cache, CacheConfig
from shards.fetch import Item
from shards.manifest import Manifest, load_manifest


def content(cache: Cache, item: Item) -> bytes:
    """What a reader gets."""
    with os.fdopen(cache.open(item), "rb") as file:
        return file.read()


def names(folder: Path) -> list[str]:
    """The files that a cache keeps there, half fetched ones too."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def read_at_once(count: int, act: Callable[[int], object]) -> None:
    """Acts in so many threads, each of which is told its number; none may raise an error."""
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
    """The small data set, read through a cache."""
    coco.write(samples_per_shard=3, **config)
    manifest = load_manifest(coco.root / "out", CacheConfig(str(tmp_path / "kept")))
    manifest.index()
    return manifest
