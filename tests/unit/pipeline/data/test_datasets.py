from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from pipeline.config import DataConfig
from pipeline.data.datasets import check_cache, check_cache_limit, check_fits_cache, open_data
from pipeline.errors import RunConfigError
from shards import config as shards_config
from shards.dataset.listed_files import File
from shards.dataset.manifest import ANNOTATIONS_NAME, IMAGES_NAME, Manifest, Shard
from shards.errors import ShardError
from shards.store import cache_space
from shards.store.sizes import GIB, size_text
from tests.support.tiny_data import TinyData

Usage = namedtuple("Usage", "free")


@pytest.fixture
def config(tiny_data: TinyData, tmp_path: Path) -> DataConfig:
    return DataConfig(train=tiny_data.train, val=tiny_data.val, cache=str(tmp_path / "kept"))


def of_size(manifest: Manifest, name: str, *gib: float) -> Manifest:
    """Return the data set with shards of these sizes, and an index of a quarter GiB."""
    shards = [Shard(f"{name}-{n}.tar", 1, int(size * GIB), f"{name}{n:060}") for n, size in enumerate(gib)]
    files = [File(file, GIB // 8, f"{name}{file:>60}") for file in (IMAGES_NAME, ANNOTATIONS_NAME)]
    return msgspec.structs.replace(manifest, shards=tuple(shards), files=tuple(files))


def sets(config: DataConfig) -> tuple[Manifest, Manifest]:
    """Return training shards of 10 x 1 GiB, validation shards of 2 GiB together."""
    train, val = open_data(config)
    return of_size(train, "train", *[1.0] * 10), of_size(val, "val", 0.5, 1.5)


def test_both_data_sets_are_read_through_the_cache_of_the_run(config: DataConfig, tmp_path: Path) -> None:
    train, val = open_data(replace(config, cache_gib=3))
    assert train.cache == val.cache == shards_config.CacheConfig(str(tmp_path / "kept"), 3)
    assert train.url == config.train


@pytest.mark.parametrize("built_in", [True, False])
def test_built_in_data_of_another_format_says_what_to_delete(tmp_path: Path, built_in: bool) -> None:
    config = DataConfig(train=str(tmp_path / "train"), val=str(tmp_path / "val"), built_in=built_in)
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text('{"format": 1}')
    message = r"train/manifest.json: got format 1, expected 2"
    with pytest.raises(ShardError, match=rf"{message}: write the data set again"):
        open_data(config)  # a user's own data has no source folder beside it, and must not be deleted
    (tmp_path / "source").mkdir()
    advice = rf"; the built-in data .* delete {tmp_path} and start again$" if built_in else ": write the data set again"
    with pytest.raises(ShardError, match=message + advice) as caught:
        open_data(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("check", [check_cache, check_cache_limit])
def test_a_cache_limit_below_the_data_is_refused_with_a_remedy(config: DataConfig, check) -> None:
    config = replace(config, cache_gib=12.4)
    with pytest.raises(
        RunConfigError,
        match=r"shards and index take 12.50 GiB but .* may hold 12.40 GiB.*--data.cache-gib .*--data.shuffle-shards N .*cache off",
    ) as caught:
        check(config, *sets(config))
    assert "\n" not in str(caught.value)
    config = replace(config, cache_gib=12.5)
    check(config, *sets(config))


@pytest.mark.parametrize("check", [check_cache, check_cache_limit])
def test_two_blocks_and_the_validation_data_must_fit_the_cache(config: DataConfig, check) -> None:
    config = replace(config, cache_gib=6.4, shuffle_shards=2)
    with pytest.raises(
        RunConfigError, match=r"data.shuffle_shards 2, .* 6.50 GiB but .* 6.40 GiB;.*lower --data.shuffle-shards"
    ):
        check(config, *sets(config))
    config = replace(config, cache_gib=6.5)
    check(config, *sets(config))


def test_too_little_disk_space_is_refused_before_downloads(config: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_space.shutil, "disk_usage", lambda _: Usage(cache_space.SPARE + 7 * GIB))
    with pytest.raises(RunConfigError, match=rf"12.50 GiB but {config.cache} may hold 7.00 GiB"):
        check_cache(config, *sets(config))
    check_cache(replace(config, shuffle_shards=2), *sets(config))


@pytest.mark.parametrize("folder", ["", "off"])
def test_data_that_is_not_cached_needs_no_space(config: DataConfig, folder: str) -> None:
    config = replace(config, cache=folder, cache_gib=0.001)
    for check in (check_cache, check_cache_limit):
        check(config, *sets(config))


def test_an_evaluation_that_does_not_fit_is_refused_with_a_remedy(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, val = sets(config)
    monkeypatch.setattr(cache_space.shutil, "disk_usage", lambda _: Usage(cache_space.SPARE + int(2.24 * GIB)))
    with pytest.raises(RunConfigError, match=r"shards and index take 2.25 GiB but .* may hold 2.24 GiB; .* DETR_CACHE"):
        check_fits_cache(val)
    monkeypatch.setattr(cache_space.shutil, "disk_usage", lambda _: Usage(cache_space.SPARE + int(2.25 * GIB)))
    check_fits_cache(val)


def test_sizes_in_a_message_can_be_distinguished() -> None:
    assert [size_text(size) for size in (999, 3 << 20, (3 << 20) + (1 << 18), 3 << 29)] == [
        *("999 bytes", "3.0 MiB", "3.2 MiB", "1.50 GiB")
    ]
