"""Damage in the cache or in the store: fetched again, or reported in one line with its location."""

import time

import numpy as np
import pytest

from shards.config import CacheConfig, ReadConfig
from shards.dataset.manifest import load_manifest
from shards.errors import ShardError
from shards.read.loader import read_samples
from shards.read.member_reader import MemberReader
from shards.store.download import DigestError
from tests.support.cached_files import kept, names, read_at_once


@pytest.mark.parametrize("damage", [lambda b: b[:700] + bytes([b[700] ^ 1]) + b[701:], lambda b: b[:-100]])
def test_a_cached_file_that_changed_is_fetched_again(coco, tmp_path, asked, damage):
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
    """Return the data set, the row of an image that is damaged in the store, and its shard."""
    manifest = kept(coco, tmp_path)
    record = manifest.index().images[4]
    shard = manifest.shards[record["shard"]]
    path = coco.root / "out" / shard.name
    bad = bytearray(path.read_bytes())
    bad[record["offset"] + 50] ^= 4
    path.write_bytes(bad)
    return manifest, 4, shard


def test_a_flipped_bit_in_the_store_names_image_and_shard(coco, tmp_path, asked):
    manifest, row, shard = damaged(coco, tmp_path)
    asked.clear()
    image_id = int(manifest.index().images[row]["image_id"])
    message = rf"^image {image_id} in {shard.name}: .*its sha256 is not the manifest's"
    with pytest.raises(DigestError, match=message) as caught:
        list(read_samples(manifest, [row - 1]))  # another image of that shard
    assert "\n" not in str(caught.value)
    # Twice because the transfer might have damaged it, and once more to find the image.
    assert asked == [(shard.name, 0)] * 3
    assert shard.sha256 not in names(tmp_path / "kept")


def test_a_changed_byte_outside_the_images_is_reported_as_such(coco, tmp_path):
    manifest = kept(coco, tmp_path)
    path = coco.root / "out" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DigestError, match=r"^shard-000001.tar beside its images: .*its sha256 is not the manifest's"):
        list(read_samples(manifest, range(7)))


def test_only_the_damaged_sample_is_left_out_if_bad_samples_are_allowed(coco, tmp_path, caplog):
    manifest, row, shard = damaged(coco, tmp_path)
    found = [sample.row for sample in read_samples(manifest, range(7), ReadConfig(threads=2, max_bad_samples=1))]
    assert found == [number for number in range(7) if number != row]
    image_id = int(manifest.index().images[row]["image_id"])
    assert f"1 of at most 1 bad samples: image {image_id} in {shard.name}: its bytes changed" in caplog.text


def test_many_threads_search_for_the_damaged_image_only_once(coco, tmp_path, asked, monkeypatch):
    find = MemberReader._find_damaged
    monkeypatch.setattr(MemberReader, "_find_damaged", lambda self, shard: time.sleep(0.05) or find(self, shard))
    manifest, row, shard = damaged(coco, tmp_path)
    members = MemberReader(manifest)
    asked.clear()
    messages = []

    def read(_):
        with pytest.raises(DigestError) as caught:
            members.image(row - 1)
        messages.append(str(caught.value))

    read_at_once(8, read)
    assert len(messages) == 8
    assert len(set(messages)) == 1
    assert f"image {int(manifest.index().images[row]['image_id'])} in {shard.name}: " in messages[0]
    assert asked == [(shard.name, 0)] * 3


def test_a_truncated_shard_in_the_store_raises_one_line(coco, tmp_path):
    manifest = kept(coco, tmp_path)
    path = coco.root / "out" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-700])
    size = manifest.shards[1].bytes
    with pytest.raises(
        DigestError, match=rf"shard-000001.tar: truncated: got {size - 700} bytes, expected {size}: copy"
    ):
        list(read_samples(manifest, range(7)))


def test_a_missing_shard_in_the_store_raises_one_line(coco, tmp_path):
    manifest = kept(coco, tmp_path)
    (coco.root / "out" / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar: no such file; the manifest lists it"):
        list(read_samples(manifest, range(7)))


def test_a_cached_index_that_changed_is_fetched_again(coco, tmp_path, asked):
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
