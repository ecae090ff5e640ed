"""A run's data sets, and whether what a node keeps of them fits its cache."""

from __future__ import annotations

from pathlib import Path

from pipeline.config import DataConfig
from pipeline.errors import RunConfigError
from shards.cache import CacheConfig, cache_for
from shards.errors import OtherFormatError, ShardError
from shards.manifest import ANNOTATIONS_NAME, IMAGES_NAME, Manifest, load_manifest
from shards.room import GIB, size_text


def open_data(config: DataConfig) -> tuple[Manifest, Manifest]:
    """The manifests of training and validation, read through the cache that the run asks for."""
    cache = CacheConfig(config.cache, config.cache_gib)
    try:
        return load_manifest(config.train, cache), load_manifest(config.val, cache)
    except OtherFormatError as error:
        folder = Path(config.train).parent
        # Where they were made together they have their source beside them; a person's own data is not to be deleted.
        if not (config.built_in and folder == Path(config.val).parent and (folder / "source").is_dir()):
            raise
        said = str(error).rpartition(": ")[0]
        raise ShardError(
            f"{said}; the built-in data is made where it is absent: delete {folder} and start again"
        ) from None


def check_cache(config: DataConfig, train: Manifest, val: Manifest) -> None:
    """Refuse an order that would fetch the same shards again and again, for lack of room on this node.

    Raises `RunConfigError` saying what is needed, what there is, and what to set.
    """
    for manifest in (train, val):
        cache = cache_for(manifest.url, manifest.cache)
        if cache is not None:
            _check(config, train, val, cache.room(), str(cache))
            return


def check_cache_limit(config: DataConfig, train: Manifest, val: Manifest) -> None:
    """As `check_cache`, of the limit alone, on a machine that need not be one of the nodes."""
    if config.cache_gib and any(cache_for(manifest.url, manifest.cache) for manifest in (train, val)):
        _check(config, train, val, int(config.cache_gib * GIB), "the cache")


def check_room(manifest: Manifest) -> None:
    """As `check_cache`, of a data set that is evaluated outside of a run: the environment says where it is kept."""
    cache = cache_for(manifest.url, manifest.cache)
    needed = sum(shard.bytes for shard in manifest.shards) + sum(_index_sizes(manifest).values())
    if cache is not None and needed > cache.room():
        raise RunConfigError(
            f"shards and index take {size_text(needed)} but {cache} may hold {size_text(cache.room())}; expected room for all, or they "
            "would be fetched again and again: free some disk, or set DETR_CACHE to another folder, or to off"
        )


def _check(config: DataConfig, train: Manifest, val: Manifest, room: int, where: str) -> None:
    needed, largest = (sum(sizes) for sizes in (_sizes(train, val), _sizes(train, val, config.shuffle_shards)))
    if config.shuffle_shards == 0 and needed > room:
        raise RunConfigError(
            f"shards and index take {size_text(needed)} but {where} may hold {size_text(room)}, and an epoch that is shuffled as a "
            "whole would fetch them again and again; expected room for all: raise --data.cache-gib or free some disk, or set "
            "--data.shuffle-shards N to shuffle in blocks, or --data.cache off"
        )
    if largest > room:
        raise RunConfigError(
            f"two blocks of data.shuffle_shards {config.shuffle_shards}, the validation shards and both indexes take "
            f"{size_text(largest)} but {where} may hold {size_text(room)}; expected room for them: lower --data.shuffle-shards, raise "
            "--data.cache-gib or free some disk, or set --data.cache off"
        )


def _sizes(train: Manifest, val: Manifest, block: int = 0) -> list[int]:
    """Bytes of the cached files that are wanted at a time: of two blocks, where one ends and the next begins.

    The index of either data set is held all the time.
    """
    of_train, of_val = (
        {shard.sha256: shard.bytes for shard in manifest.shards} if cache_for(manifest.url, manifest.cache) else {}
        for manifest in (train, val)
    )
    held = {
        sha256: size
        for manifest in (train, val)
        if cache_for(manifest.url, manifest.cache)
        for sha256, size in _index_sizes(manifest).items()
    }
    if block == 0:
        return list((of_train | of_val | held).values())
    return [*sorted(of_train.values())[-2 * block :], *of_val.values(), *held.values()]


def _index_sizes(manifest: Manifest) -> dict[str, int]:
    """Bytes of the files of the index, by their sha256."""
    return {file.sha256: file.bytes for file in manifest.files if file.name in (IMAGES_NAME, ANNOTATIONS_NAME)}
