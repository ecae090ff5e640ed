import errno
import os

import pytest

from shards.dataset import tars
from shards.dataset.verify import verify
from shards.errors import ShardError


@pytest.fixture
def written(coco):
    return coco.write(samples_per_shard=3)


def problems(coco) -> list[str]:
    report = verify(coco.root / "out")
    assert report.ok == (not report.problems)
    assert not any("\n" in problem for problem in report.problems)
    return list(report.problems)


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 16
    path.write_bytes(content)


def test_written_data_set_is_valid(coco, written):
    calls = []
    report = verify(coco.root / "out", lambda *call: calls.append(call))
    assert report.ok
    assert (report.images, report.shards, report.bytes) == (7, 3, sum(shard.bytes for shard in written.shards))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_a_flipped_bit_of_an_image_names_the_image(coco, written):
    record = written.index().images[4]
    damage(coco.root / "out" / "shard-000001.tar", record["offset"] + 30)
    (problem,) = problems(coco)
    assert "shard-000001.tar: its sha256 is not the manifest's" in problem
    assert f"images of 1 samples differ from the index, such as image {record['image_id']}" in problem


def test_a_flipped_bit_beside_the_images_is_noticed(coco, written):
    record = written.index().images[3]
    end = record["offset"] + record["length"]
    damage(coco.root / "out" / "shard-000001.tar", (end + 511) // 512 * 512 + 512 + 10)  # inside the annotations
    (problem,) = problems(coco)
    assert "its images are unchanged, but other bytes of it differ" in problem


def test_a_flipped_bit_of_segmentations_names_the_image(coco, written):
    record = written.index().images[5]
    damage(coco.root / "out" / "shard-000001.tar", record["text_offset"] + record["text_length"] // 2)
    (problem,) = problems(coco)
    assert f"segmentations of 1 samples differ from the index, such as image {record['image_id']}" in problem


def test_a_flipped_bit_of_a_header_is_noticed(coco, written):
    damage(coco.root / "out" / "shard-000001.tar", 3)
    (problem,) = problems(coco)
    assert "shard-000001.tar: its sha256 is not the manifest's" in problem


def test_truncated_shard_is_reported_with_the_number_of_lost_images(coco, written):
    path = coco.root / "out" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[: written.index().images[1]["offset"]])  # exactly at a member's start
    (problem,) = problems(coco)
    assert "shard-000000.tar: truncated: got" in problem
    assert "2 of its 3 images are lost" in problem


def test_every_problem_is_reported(coco, written):
    (coco.root / "out" / "shard-000000.tar").unlink()
    path = coco.root / "out" / "shard-000002.tar"
    path.write_bytes(path.read_bytes() + b"more")
    damage(coco.root / "out" / "source.json", 0)
    found = problems(coco)
    assert len(found) == 3
    assert "source.json: its sha256" in found[0]
    assert "shard-000000.tar: no such file; the manifest lists it with 3 images" in found[1]
    assert "shard-000002.tar: too long" in found[2]


def test_a_damaged_index_does_not_hide_damaged_shards(coco, written):
    damage(coco.root / "out" / "shard-000001.tar", written.index().images[4]["offset"])
    damage(coco.root / "out" / "index" / "images.npy", 200)
    found = problems(coco)
    assert ["index/images.npy" in found[0], "shard-000001.tar" in found[1]] == [True, True]


def test_unreadable_shards_are_reported_with_the_others(coco, written, monkeypatch):
    def digest(path):
        if path.name == "shard-000000.tar":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if path.name == "shard-000002.tar":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return tars.file_digest(path)

    monkeypatch.setattr("shards.dataset.verify.file_digest", digest)
    first, last = problems(coco)
    assert "out/shard-000000.tar: cannot be read: [Errno 5] Input/output error" in first
    assert "out/shard-000002.tar: cannot be read: [Errno 13] Permission denied" in last


def test_without_a_manifest_there_is_nothing_to_check(tmp_path):
    with pytest.raises(ShardError, match=r"no manifest\.json here"):
        verify(tmp_path)
