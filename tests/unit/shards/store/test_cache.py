"""Fetching through the cache: each file once, and no leftovers of a failed fetch."""

import errno
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from shards.config import CacheConfig
from shards.dataset.manifest import load_manifest
from shards.errors import ShardError
from shards.read.loader import read_samples
from shards.store import download, storage
from shards.store.cache import Cache, cache_for
from shards.store.download import Item
from tests.support.cached_files import content, kept, names, read_at_once


def test_many_threads_fetch_a_file_only_once(store, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "PIECE", 300)
    item = store("x")
    read_at_once(12, lambda number: content(Cache(tmp_path / "kept"), item))
    assert sorted(asked) == [("x", 0), ("x", 300), ("x", 600), ("x", 900)]
    assert content(Cache(tmp_path / "kept"), item) == (tmp_path / "store/x").read_bytes()
    assert names(tmp_path / "kept") == [item.sha256]


def test_files_are_cached_by_digest_and_not_by_url(store, asked, tmp_path):
    cache = Cache(tmp_path / "kept")
    first, other = store("x"), store("other", 999)
    (tmp_path / "moved").mkdir()
    (tmp_path / "store/x").rename(tmp_path / "moved/x")
    moved = Item(str(tmp_path / "moved/x"), first.bytes, first.sha256)
    expected = (tmp_path / "moved/x").read_bytes()
    assert content(cache, moved) == content(cache, first) == expected
    same_name = Item(first.url.replace("store/x", "store/other"), other.bytes, other.sha256)
    assert content(cache, same_name) != expected
    assert len(asked) == 2


def test_cached_samples_equal_those_of_the_store(coco, tmp_path, asked):
    manifest = kept(coco, tmp_path)
    assert asked  # the index
    asked.clear()
    local = load_manifest(coco.root / "out")
    for _ in range(2):
        pairs = zip(read_samples(manifest, range(7)), read_samples(local, range(7)), strict=True)
        assert all(np.array_equal(ours.image, theirs.image) for ours, theirs in pairs)
    assert sorted(asked) == [(shard.name, 0) for shard in manifest.shards]


def test_a_waiting_process_fetches_the_file_if_the_first_is_killed(store, tmp_path, asked):
    item = store("x")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from shards.store import storage\n"
        "from shards.store.cache import Cache, Item\n"
        "storage.read_range = lambda *_: print('fetching', flush=True) or time.sleep(99)\n"
        f"Cache(Path({str(tmp_path / 'kept')!r})).open(Item({item.url!r}, 1000, {item.sha256!r}))"
    )
    fetcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert fetcher.stdout.readline() == "fetching\n"
    found = []
    second = threading.Thread(target=lambda: found.append(content(Cache(tmp_path / "kept"), item)))
    second.start()
    time.sleep(0.2)
    assert not asked  # it waits
    fetcher.kill()
    second.join(60)
    fetcher.communicate()
    assert [len(data) for data in found] == [1000]
    assert names(tmp_path / "kept") == [item.sha256]


def test_a_full_disk_raises_one_line_and_leaves_no_file(store, tmp_path):
    """The kernel's limit on file sizes simulates a full disk: the same calls fail."""
    item = store("x", 100_000)
    code = (
        "import resource\n"
        "from pathlib import Path\n"
        "from shards.store.cache import Cache, Item\n"
        "from shards.errors import ShardError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        f"    Cache(Path({str(tmp_path / 'kept')!r})).open(Item({item.url!r}, 100_000, {item.sha256!r}))\n"
        "except ShardError as error:\n"
        "    print(error)"
    )
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "kept: the cache cannot be written (File too large); expected a folder with free space" in printed
    assert printed.count("\n") == 1
    assert names(tmp_path / "kept") == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_failed_write_raises_one_line_and_leaves_no_file(store, tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(download.os, "pwrite", fails)
    with pytest.raises(ShardError, match=r"kept: the cache cannot be written \("):
        Cache(tmp_path / "kept").open(store("x"))
    assert names(tmp_path / "kept") == []


def test_an_impossible_folder_raises_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match=r"file/kept: the cache cannot be written"):
        Cache(tmp_path / "file" / "kept")


def test_an_error_of_the_store_passes_unchanged_and_leaves_no_file(store, tmp_path, monkeypatch):
    def away(*_):
        raise ConnectionError("gone")

    monkeypatch.setattr(storage, "read_range", away)
    with pytest.raises(ConnectionError):
        Cache(tmp_path / "kept").open(store("x"))
    assert names(tmp_path / "kept") == []


def test_local_data_sets_have_a_cache_only_on_request(tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_CACHE", str(tmp_path / "environment"))
    assert str(cache_for("s3://b/set", CacheConfig())) == str(tmp_path / "environment")
    assert str(cache_for("s3://b/set", CacheConfig(str(tmp_path / "given")))) == str(tmp_path / "given")
    assert cache_for("s3://b/set", CacheConfig("off")) is None
    assert cache_for("/data/set", CacheConfig()) is None
    assert str(cache_for("/data/set", CacheConfig(str(tmp_path / "given")))) == str(tmp_path / "given")
    monkeypatch.setenv("DETR_CACHE", "off")
    assert cache_for("s3://b/set", CacheConfig()) is None
    monkeypatch.delenv("DETR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert str(cache_for("s3://b/set", CacheConfig())) == str(tmp_path / "xdg/detr-cluster/shards")


def test_a_manifest_file_with_a_cache_is_refused(coco):
    coco.write()
    path = coco.root / "out" / "manifest.json"
    path.write_bytes(path.read_bytes().strip()[:-1] + b',"cache":{"folder":"/elsewhere"}}')
    with pytest.raises(ShardError, match="must not contain its own url or cache"):
        load_manifest(coco.root / "out")


def test_digest_and_json_do_not_depend_on_the_cache(coco, tmp_path):
    coco.write()
    plain, cached = (load_manifest(coco.root / "out", CacheConfig(folder)) for folder in ("", str(tmp_path / "kept")))
    assert plain.digest == cached.digest
    assert plain.to_json() == cached.to_json()
