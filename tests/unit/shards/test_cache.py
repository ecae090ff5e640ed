import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from shards import cache as caching
from shards import fetch, room, storage
from shards.cache import Cache, CacheConfig, cache_for
from shards.errors import ShardError
from shards.fetch import DigestError, Item
from shards.listed import File, load_listed
from shards.manifest import load_index, load_manifest
from shards.members import Members
from shards.plan import PlanConfig, plan_epoch
from shards.read import ReadConfig, open_loader, read_samples
from shards.room import GIB


@pytest.fixture
def asked(monkeypatch):
    """The (file, offset) of every range that is asked of the store, in order."""
    found = []
    read = storage.read_range

    def reading(url, offset, length):
        found.append((url.rpartition("/")[2], offset))
        return read(url, offset, length)

    monkeypatch.setattr(storage, "read_range", reading)
    return found


@pytest.fixture
def store(tmp_path):
    """Makes files of random bytes that stand for a store's: an Item each."""
    (tmp_path / "store").mkdir()

    def make(name, size=1000):
        content = np.random.default_rng(size).bytes(size)
        (tmp_path / "store" / name).write_bytes(content)
        return Item(str(tmp_path / "store" / name), size, hashlib.sha256(content).hexdigest())

    return make


def content(cache, item):
    with os.fdopen(cache.open(item), "rb") as file:
        return file.read()


def never(_):
    raise AssertionError("waits")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def read_at_once(count, act):
    errors = []

    def run(number):
        try:
            act(number)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def kept(coco, tmp_path, **config):
    """The small data set, read through a cache."""
    coco.write(samples_per_shard=3, **config)
    manifest = load_manifest(coco.root / "out", CacheConfig(str(tmp_path / "kept")))
    manifest.index()
    return manifest


def test_a_file_is_fetched_once_however_many_threads_want_it(store, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "PIECE", 300)
    item = store("x")
    read_at_once(12, lambda number: content(Cache(tmp_path / "kept"), item))
    assert sorted(asked) == [("x", 0), ("x", 300), ("x", 600), ("x", 900)]
    assert content(Cache(tmp_path / "kept"), item) == (tmp_path / "store/x").read_bytes()
    assert names(tmp_path / "kept") == [item.sha256]


def test_a_data_set_that_moved_is_not_fetched_again_and_another_does_not_mix(store, asked, tmp_path):
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


def test_samples_come_from_the_cache_as_from_the_store(coco, tmp_path, asked):
    manifest = kept(coco, tmp_path)
    assert asked  # the index
    asked.clear()
    local = load_manifest(coco.root / "out")
    for _ in range(2):
        pairs = zip(read_samples(manifest, range(7)), read_samples(local, range(7)), strict=True)
        assert all(np.array_equal(ours.image, theirs.image) for ours, theirs in pairs)
    assert sorted(asked) == [(shard.name, 0) for shard in manifest.shards]


def test_the_least_recently_read_goes_first(store, tmp_path, monkeypatch):
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
def test_a_file_that_is_being_read_stays(store, tmp_path, already_there):
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


def test_who_finds_no_room_waits_until_a_file_is_no_longer_read(store, tmp_path):
    cache = Cache(tmp_path / "kept", 1000)
    held = cache.open(store("a", 1000))
    threading.Timer(0.15, os.close, (held,)).start()
    start = time.monotonic()
    assert len(content(cache, store("b", 999))) == 999
    assert time.monotonic() - start > 0.1


def test_threads_that_share_a_cache_of_one_file_all_get_on(store, tmp_path):
    cache = Cache(tmp_path / "kept", 1000)
    items = [store(name, 1000 - number) for number, name in enumerate("abcd")]

    def read(number):
        for turn in range(3):
            item = items[(number + turn) % 4]
            assert hashlib.sha256(content(cache, item)).hexdigest() == item.sha256

    read_at_once(4, read)


def test_shuffling_in_blocks_fetches_each_shard_once_an_epoch_through_a_cache_of_two_blocks(coco, tmp_path, asked):
    shards = coco.write(samples_per_shard=1).shards
    # Two shards, what the index takes, and a little more.
    index = sum((coco.root / "out" / "index" / name).stat().st_size for name in ("images.npy", "annotations.npy"))
    room = index + sum(sorted(shard.bytes for shard in shards)[-2:])
    manifest = load_manifest(coco.root / "out", CacheConfig(str(tmp_path / "kept"), (room + 100) / GIB))
    for epoch in range(2):
        plan = plan_epoch(manifest, seed=1, epoch=epoch, batch_size=1, epochs=2, config=PlanConfig(shuffle_shards=1))
        config = ReadConfig(threads=1, prefetch=1)
        loader = open_loader(manifest, plan, transform=lambda one: one.row, collate=list, config=config)
        assert sorted(row for (row,) in loader) == list(range(7))
    fetched = Counter(name for name, _ in asked if name.endswith(".tar"))
    assert set(fetched) == {shard.name for shard in shards}
    assert max(fetched.values()) <= 2
    assert len([name for name in names(tmp_path / "kept")]) <= 4


def test_what_a_dead_process_left_half_fetched_makes_room(store, tmp_path):
    cache = Cache(tmp_path / "kept", 1500)
    (tmp_path / "kept" / "dead.part").write_bytes(bytes(1000))
    (tmp_path / "kept" / "dead.lock").touch()
    item = store("x")
    with (tmp_path / "kept" / "dead.lock").open() as alive:
        fcntl.flock(alive, fcntl.LOCK_EX)
        assert not cache._room._make_room(item)
    assert len(content(cache, item)) == 1000
    assert names(tmp_path / "kept") == [item.sha256]


def test_who_waits_for_a_fetch_takes_over_when_the_fetcher_is_killed(store, tmp_path, asked):
    item = store("x")
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from shards import storage\n"
        "from shards.cache import Cache, Item\n"
        "storage.read_range = lambda *_: print('fetching', flush=True) or time.sleep(99)\n"
        f"Cache(Path({str(tmp_path / 'kept')!r})).open(Item({item.url!r}, 1000, {item.sha256!r}))"
    )
    fetcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert fetcher.stdout.readline() == "fetching\n"
    found = []
    waiting = threading.Thread(target=lambda: found.append(content(Cache(tmp_path / "kept"), item)))
    waiting.start()
    time.sleep(0.2)
    assert not asked  # it waits
    fetcher.kill()
    waiting.join(10)
    fetcher.communicate()
    assert [len(one) for one in found] == [1000]
    assert names(tmp_path / "kept") == [item.sha256]


@pytest.mark.parametrize("damage", [lambda b: b[:700] + bytes([b[700] ^ 1]) + b[701:], lambda b: b[:-100]])
def test_a_copy_that_changed_on_the_disk_is_fetched_once_more(coco, tmp_path, asked, damage):
    manifest = kept(coco, tmp_path)
    expected = [sample.image for sample in read_samples(manifest, range(7))]
    record = manifest.index().images[0]
    shard = manifest.shards[record["shard"]]
    copy = tmp_path / "kept" / shard.sha256
    good = copy.read_bytes()
    copy.write_bytes(good[: record["offset"]] + damage(good[record["offset"] :]))
    asked.clear()
    found = [sample.image for sample in read_samples(manifest, range(7), ReadConfig(threads=2))]
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
    assert asked == [(shard.name, 0)]
    assert copy.read_bytes() == good


def damaged(coco, tmp_path):
    """The data set, the row of one image whose bytes differ in the store, and its shard."""
    manifest = kept(coco, tmp_path)
    record = manifest.index().images[4]
    shard = manifest.shards[record["shard"]]
    path = coco.root / "out" / shard.name
    bad = bytearray(path.read_bytes())
    bad[record["offset"] + 50] ^= 4
    path.write_bytes(bad)
    return manifest, 4, shard


def test_a_bit_flipped_in_the_store_is_one_clear_line_naming_image_and_shard(coco, tmp_path, asked):
    manifest, row, shard = damaged(coco, tmp_path)
    asked.clear()
    image_id = int(manifest.index().images[row]["image_id"])
    message = rf"^image {image_id} in {shard.name}: .*its sha256 is not the manifest's"
    with pytest.raises(DigestError, match=message) as caught:
        list(read_samples(manifest, [row - 1]))  # another of that shard
    assert "\n" not in str(caught.value)
    # It might have been damaged on its way; the third time is to find the image.
    assert asked == [(shard.name, 0)] * 3
    assert shard.sha256 not in names(tmp_path / "kept")


def test_a_byte_changed_beside_the_images_is_said_to_be_there(coco, tmp_path):
    manifest = kept(coco, tmp_path)
    path = coco.root / "out" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestError, match=r"^shard-000001.tar beside its images: .*its sha256 is not the manifest's"):
        list(read_samples(manifest, range(7)))


def test_where_bad_samples_are_allowed_only_the_damaged_one_is_left_out(coco, tmp_path, caplog):
    manifest, row, shard = damaged(coco, tmp_path)
    found = [sample.row for sample in read_samples(manifest, range(7), ReadConfig(threads=2, max_bad_samples=1))]
    assert found == [number for number in range(7) if number != row]
    image_id = int(manifest.index().images[row]["image_id"])
    assert f"1 of at most 1 bad samples: image {image_id} in {shard.name}: its bytes changed" in caplog.text


def test_a_truncated_shard_is_one_clear_line_at_once(coco, tmp_path):
    manifest = kept(coco, tmp_path)
    path = coco.root / "out" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-700])
    size = manifest.shards[1].bytes
    with pytest.raises(
        DigestError, match=rf"shard-000001.tar: truncated: got {size - 700} bytes, expected {size}: copy"
    ):
        list(read_samples(manifest, range(7)))


def test_a_missing_shard_is_one_clear_line(coco, tmp_path):
    manifest = kept(coco, tmp_path)
    (coco.root / "out" / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar: no such file; the manifest lists it"):
        list(read_samples(manifest, range(7)))


def test_an_index_that_changed_on_the_disk_is_fetched_again(coco, tmp_path, asked):
    manifest = kept(coco, tmp_path)
    listed = next(file for file in manifest.files if file.name == "index/images.npy")
    copy = tmp_path / "kept" / listed.sha256
    good = copy.read_bytes()
    copy.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    asked.clear()
    again = load_manifest(coco.root / "out", CacheConfig(str(tmp_path / "kept"), gib=1))
    assert np.array_equal(again.index().images, load_manifest(coco.root / "out").index().images)
    assert asked == [("images.npy", 0)]
    assert isinstance(again.index().images, np.memmap)


def test_a_shard_larger_than_the_room_is_one_clear_line(store, tmp_path):
    item = store("x", 2000)
    with pytest.raises(
        ShardError, match=r"kept: no room for .*/x: got .* and a limit of 1999 bytes, expected 2000 bytes "
    ) as caught:
        Cache(tmp_path / "kept", 1999).open(item)
    assert "\n" not in str(caught.value)


def test_space_is_looked_for_before_anything_is_asked_for(store, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=room.SPARE + 900))
    with pytest.raises(ShardError, match="no room"):
        Cache(tmp_path / "kept").open(store("x"))
    assert not asked
    assert names(tmp_path / "kept") == []


def test_a_disk_that_is_full_all_the_same_is_one_clear_line_and_nothing_is_left(store, tmp_path):
    """A limit of the kernel's on the size of files stands for the disk's: both are errors of the same calls."""
    item = store("x", 100_000)
    code = (
        "import resource\n"
        "from pathlib import Path\n"
        "from shards.cache import Cache, Item\n"
        "from shards.errors import ShardError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        f"    Cache(Path({str(tmp_path / 'kept')!r})).open(Item({item.url!r}, 100_000, {item.sha256!r}))\n"
        "except ShardError as error:\n"
        "    print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "kept: the cache cannot be written (File too large); expected a folder with room" in said
    assert said.count("\n") == 1
    assert names(tmp_path / "kept") == []


def test_room_on_the_disk_is_taken_before_the_first_byte_is_asked_for(store, tmp_path, monkeypatch):
    item = store("x", 1 << 20)
    taken = []
    read = storage.read_range

    def reading(*place):
        (part,) = (tmp_path / "kept").glob("*.part")
        taken.append(part.stat().st_blocks * 512)
        return read(*place)

    monkeypatch.setattr(storage, "read_range", reading)
    content(Cache(tmp_path / "kept"), item)
    assert taken[0] >= item.bytes


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_write_that_fails_is_one_clear_line(store, tmp_path, monkeypatch, number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fetch.os, "pwrite", fails)
    with pytest.raises(ShardError, match=r"kept: the cache cannot be written \("):
        Cache(tmp_path / "kept").open(store("x"))
    assert names(tmp_path / "kept") == []


def test_a_mapped_index_stays_and_lets_go_with_its_last_user(coco, store, tmp_path, monkeypatch):
    folder = tmp_path / "kept"
    coco.write()
    manifest = load_manifest(coco.root / "out", CacheConfig(str(folder)))
    images = load_index(manifest).images["image_id"]  # all that is left of it
    listed = next(file for file in manifest.files if file.name == "index/images.npy")
    small = Cache(folder, listed.bytes + 100)
    assert len(content(small, store("x", 99))) == 99
    assert listed.sha256 in names(folder)
    # Waiting for room would be waiting for itself.
    monkeypatch.setattr(room.time, "sleep", never)
    with pytest.raises(ShardError, match="no room"):
        small.open(store("y", 101))
    assert len(set(images.tolist())) == 7
    del images
    assert len(content(small, store("y", 101))) == 101
    assert listed.sha256 not in names(folder)


def test_an_index_that_is_no_array_is_let_go_of(store, tmp_path, monkeypatch):
    monkeypatch.setattr(room.time, "sleep", never)
    item = store("x")
    cache = Cache(tmp_path / "kept", 1000)
    with pytest.raises(ShardError, match="not a NumPy array"):
        load_listed(item.url, File("x", item.bytes, item.sha256), cache)
    assert len(content(cache, store("y", 999))) == 999


def test_half_a_file_without_its_lock_makes_room(store, tmp_path):
    cache = Cache(tmp_path / "kept", 1500)
    (tmp_path / "kept" / "dead.part").write_bytes(bytes(1000))
    item = store("x")
    assert len(content(cache, item)) == 1000
    assert names(tmp_path / "kept") == [item.sha256]


def test_who_waits_long_for_room_says_so_once(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(room, "PATIENCE_S", 0.05)
    monkeypatch.setattr(room, "WAIT_S", 0.02)
    cache = Cache(tmp_path / "kept", 1000)
    held = cache.open(store("a", 1000))
    threading.Timer(0.2, os.close, (held,)).start()
    item = store("b", 999)
    assert len(content(cache, item)) == 999
    assert [message for message in caplog.messages if f"waiting for room for {item.url}" in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_room_is_given_to_one_at_a_time(store, tmp_path, monkeypatch):
    taken = []
    make, allocate = room.Room._make_room, room._allocate

    def making(self, item):
        made = make(self, item)
        time.sleep(0.05)  # for another to find the same room
        return made

    def allocating(descriptor, size):
        allocate(descriptor, size)
        taken.append(sum(path.stat().st_size for path in (tmp_path / "kept").glob("*.part")))

    monkeypatch.setattr(room.Room, "_make_room", making)
    monkeypatch.setattr(room, "_allocate", allocating)
    monkeypatch.setattr(caching, "fetch", lambda *_: time.sleep(0.2))
    cache = Cache(tmp_path / "kept", 1500)
    items = [store(name, size) for name, size in (("a", 1000), ("b", 999))]
    read_at_once(2, lambda number: os.close(cache.open(items[number])))
    assert len(taken) == 2
    assert max(taken) <= 1500


def test_of_many_threads_one_finds_out_which_image_is_damaged(coco, tmp_path, asked, monkeypatch):
    find = Members._find_damaged
    monkeypatch.setattr(Members, "_find_damaged", lambda self, shard: time.sleep(0.05) or find(self, shard))
    manifest, row, shard = damaged(coco, tmp_path)
    members = Members(manifest)
    asked.clear()
    said = []

    def read(_):
        with pytest.raises(DigestError) as caught:
            members.image(row - 1)
        said.append(str(caught.value))

    read_at_once(8, read)
    assert len(said) == 8
    assert len(set(said)) == 1
    assert f"image {int(manifest.index().images[row]['image_id'])} in {shard.name}: " in said[0]
    assert asked == [(shard.name, 0)] * 3


def test_a_folder_that_cannot_be_one_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ShardError, match=r"file/kept: the cache cannot be written"):
        Cache(tmp_path / "file" / "kept")


def test_an_error_of_the_store_leaves_nothing_and_passes(store, tmp_path, monkeypatch):
    def away(*_):
        raise ConnectionError("gone")

    monkeypatch.setattr(storage, "read_range", away)
    with pytest.raises(ConnectionError):
        Cache(tmp_path / "kept").open(store("x"))
    assert names(tmp_path / "kept") == []


def test_remote_data_sets_have_a_cache_and_local_ones_only_where_one_is_given(tmp_path, monkeypatch):
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


def test_the_cache_knows_how_much_it_may_hold(store, tmp_path, monkeypatch):
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=room.SPARE + 5000))
    cache = Cache(tmp_path / "kept")
    content(cache, store("x"))
    assert cache.room() == 6000
    assert Cache(tmp_path / "kept", 3000).room() == 3000
    assert Cache(tmp_path / "kept", GIB).room() == 6000


def test_a_manifest_may_not_say_where_it_is_kept(coco):
    coco.write()
    path = coco.root / "out" / "manifest.json"
    path.write_bytes(path.read_bytes().strip()[:-1] + b',"cache":{"folder":"/elsewhere"}}')
    with pytest.raises(ShardError, match="may not say its own url or cache"):
        load_manifest(coco.root / "out")


def test_digest_and_json_do_not_depend_on_the_cache(coco, tmp_path):
    coco.write()
    plain, cached = (load_manifest(coco.root / "out", CacheConfig(folder)) for folder in ("", str(tmp_path / "kept")))
    assert plain.digest == cached.digest
    assert plain.to_json() == cached.to_json()
