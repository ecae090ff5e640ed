import tarfile

import pytest

from shards.errors import ShardError
from shards.tars import image_members, scan_tar


def test_scanning_finds_every_file_of_a_tar_and_refuses_a_part_of_one(coco):
    coco.write()
    path = coco.root / "out" / "shard-000000.tar"
    found = scan_tar(path)
    with tarfile.open(path) as tar:
        assert [(one.name, one.length) for one in found] == [(one.name, one.size) for one in tar]
        content = path.read_bytes()
        for one in found:
            assert content[one.offset : one.offset + one.length] == tar.extractfile(one.name).read()
    half = coco.root / "half.tar"
    half.write_bytes(content[: found[-3].offset + 5])
    with pytest.raises(ShardError, match="not a whole tar"):
        scan_tar(half)
    half.write_bytes(b"no tar at all")
    with pytest.raises(ShardError, match="not a whole tar"):
        scan_tar(half)


def test_a_samples_files_share_the_key_that_webdataset_groups_by(coco):
    coco.write()
    members = scan_tar(coco.root / "out" / "shard-000000.tar")
    images = image_members(members)
    assert len(images) == 7
    assert {one.key for one in members} == {one.key for one in images}
