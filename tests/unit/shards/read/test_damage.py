"""Damaged shards and bytes: an error of a line each, or bad samples that are left out."""

import numpy as np
import pytest

from shards.config import ReadConfig
from shards.errors import ShardError
from shards.read.bad_samples import BadSamples
from shards.read.loader import open_batches, read_samples
from shards.store import range_reader
from tests.support.reading import reading_threads


def flip(coco, row, position=50):
    manifest = coco.write(samples_per_shard=3)
    record = manifest.index().images[row]
    path = coco.root / "out" / manifest.shards[record["shard"]].name
    damaged = bytearray(path.read_bytes())
    damaged[record["offset"] + position] ^= 4
    path.write_bytes(damaged)
    return manifest, int(record["image_id"]), path


@pytest.mark.parametrize("threads", [0, 2])
def test_a_flipped_bit_raises_one_line(coco, threads):
    manifest, image_id, path = flip(coco, 4)
    with pytest.raises(ShardError, match=rf"image {image_id} in {path.name}: its bytes changed") as caught:
        list(read_samples(manifest, range(7), ReadConfig(threads)))
    assert "\n" not in str(caught.value)
    assert not reading_threads()


def test_a_truncated_shard_raises_one_line(coco):
    manifest = coco.write(samples_per_shard=3)
    last = manifest.index().images[5]
    path = coco.root / "out" / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[: last["offset"] + 100])
    message = (
        rf"image {last['image_id']} in shard-000001.tar: got 100 of {last['length']} bytes, the shard is truncated"
    )
    with pytest.raises(ShardError, match=message):
        list(read_samples(manifest, range(7)))


def test_a_missing_shard_raises_one_line(coco):
    manifest = coco.write(samples_per_shard=3)
    (coco.root / "out" / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"shard-000001.tar: no such file"):
        list(read_samples(manifest, range(7)))


def test_an_error_of_the_transform_names_the_image_and_keeps_its_cause(coco):
    manifest = coco.write()

    def transform(sample):
        return {100: 1}[sample.image_id]

    with pytest.raises(ShardError, match=r"image \d+ in shard-000000.tar: KeyError: ") as caught:
        list(open_batches(manifest, [np.arange(7)], transform=transform, collate=list))
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [OSError("away"), TimeoutError("late"), ConnectionError("gone"), MemoryError()])
def test_transient_errors_during_a_fetch_pass_unchanged(coco, monkeypatch, error):
    manifest = coco.write()

    def fails(*_):
        raise error

    monkeypatch.setattr(range_reader.RangeReader, "read", fails)
    with pytest.raises(type(error)) as caught:
        list(read_samples(manifest, range(7)))
    assert caught.value is error


def test_bytes_that_are_not_an_image_raise_an_error_that_names_it(coco, monkeypatch):
    manifest = coco.write()
    read = range_reader.RangeReader.read
    monkeypatch.setattr(range_reader.RangeReader, "read", lambda *arguments: bytes(len(read(*arguments))))
    crc32 = int(manifest.index().images["crc32"][0])
    monkeypatch.setattr("zlib.crc32", lambda content: crc32)
    with pytest.raises(ShardError, match=r"image \d+ in shard-000000.tar: UnidentifiedImageError: "):
        list(read_samples(manifest, [0]))


def spoil(coco, rows):
    """Return a data set with a flipped bit in the image of each of these rows."""
    manifest = coco.write(samples_per_shard=3)
    for record in manifest.index().images[rows]:
        path = coco.root / "out" / manifest.shards[record["shard"]].name
        damaged = bytearray(path.read_bytes())
        damaged[record["offset"] + 50] ^= 4
        path.write_bytes(damaged)
    return manifest


@pytest.mark.parametrize("threads", [0, 2])
def test_allowed_bad_samples_are_left_out_with_a_warning_each(coco, caplog, threads):
    manifest = spoil(coco, [1, 4])
    config = ReadConfig(threads, max_bad_samples=2)
    batches = [np.array([0, 1]), np.array([4]), np.array([5, 6])]
    bad = BadSamples()
    for _ in range(2):  # a sample counts once, also over several loaders
        loader = open_batches(
            manifest, batches, transform=lambda sample: sample.row, collate=list, config=config, bad=bad
        )
        assert list(loader) == [[0], [], [5, 6]]
    assert len(bad.lines()) == len(caplog.messages) == 2
    for row in (1, 4):
        assert f"image {manifest.index().images['image_id'][row]} in shard-" in caplog.text


@pytest.mark.parametrize("threads", [0, 2])
def test_too_many_bad_samples_raise_with_count_and_last_messages(coco, threads):
    manifest = spoil(coco, [1, 4, 5])
    ids = manifest.index().images["image_id"]
    with pytest.raises(
        ShardError, match=r"^3 bad samples, expected at most 2 \(max_bad_samples\); the last ones: "
    ) as caught:
        list(read_samples(manifest, range(7), ReadConfig(threads, max_bad_samples=2)))
    assert all(f"image {ids[row]} in shard-" in str(caught.value) for row in (1, 4, 5))
    assert "\n" not in str(caught.value)


def test_missing_shards_and_transform_errors_are_no_bad_samples(coco):
    manifest = coco.write(samples_per_shard=3)
    config = ReadConfig(max_bad_samples=7)
    with pytest.raises(ShardError, match="ZeroDivisionError"):
        list(open_batches(manifest, [np.arange(7)], transform=lambda sample: 1 / 0, collate=list, config=config))
    (coco.root / "out" / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match="no such file"):
        list(read_samples(manifest, range(7), config))
