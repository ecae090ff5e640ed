"""Data sets of a run, and checks that they fit the cache of a node."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import DataConfig
from pipeline.errors import RunConfigError
from shards.config import CacheConfig
from shards.dataset.manifest import ANNOTATIONS_NAME, IMAGES_NAME, Manifest, load_manifest
from shards.errors import OtherFormatError, ShardError
from shards.store.cache import cache_for
from shards.store.sizes import GIB, size_text


def open_data(config: DataConfig) -> tuple[Manifest, Manifest]:
    """Return the manifests of training and validation data, read through the run's cache."""
    cache = CacheConfig(config.cache, config.cache_gib)
    try:
        return load_manifest(config.train, cache), load_manifest(config.val, cache)
    except OtherFormatError as error:
        folder = Path(config.train).parent
        # Generated data has its source folder beside it. Never advise to delete a user's own data.
        if not (config.built_in and folder == Path(config.val).parent and (folder / "source").is_dir()):
            raise
        problem = str(error).rpartition(": ")[0]  # without the advice to write the data set again
        raise ShardError(
            f"{problem}; the built-in data is made where it is absent: delete {folder} and start again"
        ) from None


def check_cache(config: DataConfig, train: Manifest, val: Manifest) -> None:
    """Raise `RunConfigError` if this node's cache is too small, so that shards would be fetched again and again."""
    for manifest in (train, val):
        cache = cache_for(manifest.url, manifest.cache)
        if cache is not None:
            _check(config, train, val, cache.capacity(), str(cache))
            return


def check_cache_limit(config: DataConfig, train: Manifest, val: Manifest) -> None:
    """Do the same as `check_cache` for the configured limit only: this machine may not be a node of the cluster."""
    if config.cache_gib and any(cache_for(manifest.url, manifest.cache) for manifest in (train, val)):
        _check(config, train, val, int(config.cache_gib * GIB), "the cache")


def check_fits_cache(manifest: Manifest) -> None:
    """Raise `RunConfigError` if a data set that is evaluated outside of a run does not fit the cache."""
    cache = cache_for(manifest.url, manifest.cache)
    needed = sum(shard.bytes for shard in manifest.shards) + sum(_index_sizes(manifest).values())
    if cache is not None and needed > cache.capacity():
        raise RunConfigError(
            f"shards and index take {size_text(needed)} but {cache} may hold {size_text(cache.capacity())}; expected "
            "space for all, or they would be fetched again and again: free some disk, or set DETR_CACHE to "
            "another folder, or to off"
        )


def _check(config: DataConfig, train: Manifest, val: Manifest, space: int, cache: str) -> None:
    needed = sum(_sizes(train, val))
    if config.shuffle_shards == 0 and needed > space:
        raise RunConfigError(
            f"shards and index take {size_text(needed)} but {cache} may hold {size_text(space)}, and an epoch that is "
            "shuffled as a whole would fetch them again and again; expected space for all: raise --data.cache-gib or free some "
            "disk, or set --data.shuffle-shards N to shuffle in blocks, or --data.cache off"
        )
    largest = sum(_sizes(train, val, config.shuffle_shards))
    if largest > space:
        raise RunConfigError(
            f"two blocks of data.shuffle_shards {config.shuffle_shards}, the validation shards and both indexes take "
            f"{size_text(largest)} but {cache} may hold {size_text(space)}; expected space for them: lower "
            "--data.shuffle-shards, raise --data.cache-gib or free some disk, or set --data.cache off"
        )


def _sizes(train: Manifest, val: Manifest, block: int = 0) -> list[int]:
    """Return the sizes in bytes of the cached files that are needed at one time.

    Those are the indexes, the validation shards and, of the training shards, all (`block` 0) or the largest two blocks
    of `block` shards: while a block is read to its end, the next one starts.
    """
    of_train = _shard_sizes(train)
    of_val = _shard_sizes(val)
    indexes: dict[str, int] = {}
    for manifest in (train, val):
        if cache_for(manifest.url, manifest.cache):
            indexes |= _index_sizes(manifest)
    if block == 0:
        return list((of_train | of_val | indexes).values())
    return [*sorted(of_train.values())[-2 * block :], *of_val.values(), *indexes.values()]


def _shard_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of each shard by its sha256; empty if the data set is not cached."""
    if not cache_for(manifest.url, manifest.cache):
        return {}
    return {shard.sha256: shard.bytes for shard in manifest.shards}


def _index_sizes(manifest: Manifest) -> dict[str, int]:
    """Return the bytes of each file of the index by its sha256."""
    return {file.sha256: file.bytes for file in manifest.files if file.name in (IMAGES_NAME, ANNOTATIONS_NAME)}
