"""Space of the cache: eviction order, waiting, limits and errors."""

import fcntl
import hashlib
import os
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from shards.config import CacheConfig, PlanConfig, ReadConfig
from shards.dataset.listed_files import File, load_listed
from shards.dataset.manifest import load_index, load_manifest
from shards.errors import ShardError
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader
from shards.store import cache as caching
from shards.store import cache_space, storage
from shards.store.cache import Cache
from shards.store.sizes import GIB
from tests.support.cached_files import content, names, read_at_once


def never(_):
    raise AssertionError("waits")


def test_the_least_recently_read_file_is_evicted_first(store, tmp_path, monkeypatch):
    monkeypatch.setattr(caching, "STAMP_S", 0)
    cache = Cache(tmp_path / "kept", 3000)
    items = [store(name, size) for name, size in (("a", 1001), ("b", 999), ("c", 1000), ("d", 998))]
    for item in items[:3]:
        content(cache, item)
        time.sleep(0.01)
    content(cache, items[0])
    content(cache, items[3])
    assert names(tmp_path / "kept") == sorted(items[number].sha256 for number in (0, 2, 3))


@pytest.mark.parametrize("already_there", [False, True])
def test_a_file_that_is_being_read_is_not_evicted(store, tmp_path, already_there):
    cache = Cache(tmp_path / "kept", 2000)
    items = [store(name, size) for name, size in (("a", 1000), ("b", 999), ("c", 998))]
    if already_there:
        content(cache, items[0])
    held = cache.open(items[0])
    content(cache, items[1])
    content(cache, items[2])
    assert names(tmp_path / "kept") == sorted((items[0].sha256, items[2].sha256))
    os.close(held)
    content(cache, items[1])
    assert items[0].sha256 not in names(tmp_path / "kept")


def test_a_reservation_waits_until_a_file_is_no_longer_read(store, tmp_path):
    cache = Cache(tmp_path / "kept", 1000)
    held = cache.open(store("a", 1000))
    threading.Timer(0.15, os.close, (held,)).start()
    start = time.monotonic()
    assert len(content(cache, store("b", 999))) == 999
    assert time.monotonic() - start > 0.1


def test_a_long_wait_for_space_is_logged_once(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache_space, "PATIENCE_S", 0.05)
    monkeypatch.setattr(cache_space, "WAIT_S", 0.02)
    cache = Cache(tmp_path / "kept", 1000)
    held = cache.open(store("a", 1000))
    threading.Timer(0.2, os.close, (held,)).start()
    item = store("b", 999)
    assert len(content(cache, item)) == 999
    assert [message for message in caplog.messages if f"waiting for space for {item.url}" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_threads_can_share_a_cache_with_space_for_one_file(store, tmp_path):
    cache = Cache(tmp_path / "kept", 1000)
    items = [store(name, 1000 - number) for number, name in enumerate("abcd")]

    def read(number):
        for turn in range(3):
            item = items[(number + turn) % 4]
            assert hashlib.sha256(content(cache, item)).hexdigest() == item.sha256

    read_at_once(4, read)


def test_concurrent_reservations_never_exceed_the_limit(store, tmp_path, monkeypatch):
    taken = []
    evict_for, allocate = cache_space.CacheSpace._evict_for, cache_space._allocate

    def evict_slowly(self, item):
        fits = evict_for(self, item)
        time.sleep(0.05)  # another thread could find the same space
        return fits

    def allocate_and_record(descriptor, size):
        allocate(descriptor, size)
        taken.append(sum(path.stat().st_size for path in (tmp_path / "kept").glob("*.part")))

    monkeypatch.setattr(cache_space.CacheSpace, "_evict_for", evict_slowly)
    monkeypatch.setattr(cache_space, "_allocate", allocate_and_record)
    monkeypatch.setattr(caching, "fetch", lambda *_: time.sleep(0.2))
    cache = Cache(tmp_path / "kept", 1500)
    items = [store(name, size) for name, size in (("a", 1000), ("b", 999))]
    read_at_once(2, lambda number: os.close(cache.open(items[number])))
    assert len(taken) == 2
    assert max(taken) <= 1500


def test_block_shuffling_fetches_each_shard_once_per_epoch(coco, tmp_path, asked):
    shards = coco.write(samples_per_shard=1).shards
    # Space for the index, two shards and a little more.
    index = sum((coco.root / "out" / "index" / name).stat().st_size for name in ("images.npy", "annotations.npy"))
    needed = index + sum(sorted(shard.bytes for shard in shards)[-2:])
    manifest = load_manifest(coco.root / "out", CacheConfig(str(tmp_path / "kept"), (needed + 100) / GIB))
    for epoch in range(2):
        plan = plan_epoch(manifest, seed=1, epoch=epoch, batch_size=1, epochs=2, config=PlanConfig(shuffle_shards=1))
        config = ReadConfig(threads=1, prefetch=1)
        loader = open_loader(manifest, plan, transform=lambda sample: sample.row, collate=list, config=config)
        assert sorted(row for (row,) in loader) == list(range(7))
    fetched = Counter(name for name, _ in asked if name.endswith(".tar"))
    assert set(fetched) == {shard.name for shard in shards}
    assert max(fetched.values()) <= 2
    assert len([name for name in names(tmp_path / "kept")]) <= 4


def test_a_partial_file_of_a_dead_process_is_evicted(store, tmp_path):
    cache = Cache(tmp_path / "kept", 1500)
    (tmp_path / "kept" / "dead.part").write_bytes(bytes(1000))
    (tmp_path / "kept" / "dead.lock").touch()
    item = store("x")
    with (tmp_path / "kept" / "dead.lock").open() as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        assert not cache._space._evict_for(item)
    assert len(content(cache, item)) == 1000
    assert names(tmp_path / "kept") == [item.sha256]


def test_a_partial_file_without_its_lock_file_is_evicted(store, tmp_path):
    cache = Cache(tmp_path / "kept", 1500)
    (tmp_path / "kept" / "dead.part").write_bytes(bytes(1000))
    item = store("x")
    assert len(content(cache, item)) == 1000
    assert names(tmp_path / "kept") == [item.sha256]


def test_a_shard_larger_than_the_cache_raises_one_line(store, tmp_path):
    item = store("x", 2000)
    with pytest.raises(
        ShardError, match=r"kept: no space for .*/x: got .* and a limit of 1999 bytes, expected 2000 bytes "
    ) as caught:
        Cache(tmp_path / "kept", 1999).open(item)
    assert "\n" not in str(caught.value)


def test_nothing_is_requested_if_the_disk_has_no_space(store, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(cache_space.shutil, "disk_usage", lambda _: SimpleNamespace(free=cache_space.SPARE + 900))
    with pytest.raises(ShardError, match="no space"):
        Cache(tmp_path / "kept").open(store("x"))
    assert not asked
    assert names(tmp_path / "kept") == []


def test_disk_space_is_allocated_before_the_first_request(store, tmp_path, monkeypatch):
    item = store("x", 1 << 20)
    taken = []
    read = storage.read_range

    def record_and_read(*arguments):
        (partial,) = (tmp_path / "kept").glob("*.part")
        taken.append(partial.stat().st_blocks * 512)
        return read(*arguments)

    monkeypatch.setattr(storage, "read_range", record_and_read)
    content(Cache(tmp_path / "kept"), item)
    assert taken[0] >= item.bytes


def test_a_mapped_index_can_be_evicted_only_after_its_last_use(coco, store, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    coco.write()
    manifest = load_manifest(coco.root / "out", CacheConfig(str(folder)))
    images = load_index(manifest).images["image_id"]  # the only remaining reference to the index
    listed = next(file for file in manifest.files if file.name == "index/images.npy")
    small = Cache(folder, listed.bytes + 100)
    assert len(content(small, store("x", 99))) == 99
    assert listed.sha256 in names(folder)
    # Waiting for space would be waiting for itself.
    monkeypatch.setattr(cache_space.time, "sleep", never)
    with pytest.raises(ShardError, match="no space"):
        small.open(store("y", 101))
    assert len(set(images.tolist())) == 7
    del images
    assert len(content(small, store("y", 101))) == 101
    assert listed.sha256 not in names(folder)


def test_an_index_that_is_not_an_array_can_be_evicted(store, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_space.time, "sleep", never)
    item = store("x")
    cache = Cache(tmp_path / "kept", 1000)
    with pytest.raises(ShardError, match="not a NumPy array"):
        load_listed(item.url, File("x", item.bytes, item.sha256), cache)
    assert len(content(cache, store("y", 999))) == 999


def test_the_capacity_is_the_limit_or_the_free_disk_space(store, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_space.shutil, "disk_usage", lambda _: SimpleNamespace(free=cache_space.SPARE + 5000))
    cache = Cache(tmp_path / "kept")
    content(cache, store("x"))
    assert cache.capacity() == 6000
    assert Cache(tmp_path / "kept", 3000).capacity() == 3000
    assert Cache(tmp_path / "kept", GIB).capacity() == 6000
