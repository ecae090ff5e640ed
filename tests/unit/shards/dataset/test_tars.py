import tarfile

import pytest

from shards.dataset.tars import BLOCK, TarWriter, file_digest, image_members, scan_tar, tar_header
from shards.errors import ShardError


def test_scan_finds_every_file_and_refuses_truncated_tars(coco):
    coco.write()
    path = coco.root / "out" / "shard-000000.tar"
    found = scan_tar(path)
    with tarfile.open(path) as tar:
        assert [(member.name, member.length) for member in found] == [(member.name, member.size) for member in tar]
        content = path.read_bytes()
        for member in found:
            assert content[member.offset : member.offset + member.length] == tar.extractfile(member.name).read()
    half = coco.root / "half.tar"
    half.write_bytes(content[: found[-3].offset + 5])
    with pytest.raises(ShardError, match="not a whole tar"):
        scan_tar(half)
    half.write_bytes(b"no tar at all")
    with pytest.raises(ShardError, match="not a whole tar"):
        scan_tar(half)


def test_files_of_a_sample_share_the_webdataset_key(coco):
    coco.write()
    members = scan_tar(coco.root / "out" / "shard-000000.tar")
    images = image_members(members)
    assert len(images) == 7
    assert {member.key for member in members} == {member.key for member in images}


@pytest.mark.parametrize(
    ("name", "length"), [("000000000139.segmentation.json", 4321), ("a", 0), ("x" * 100, 8**11 - 1)]
)
def test_a_header_is_that_of_pythons_own_tars(name, length):
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.uname, info.gname = length, 0o444, "root", "root"
    assert tar_header(name, length) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(("name", "length"), [("x" * 101, 1), ("a", 8**11)])
def test_names_and_sizes_too_long_for_a_header_are_refused(name, length):
    with pytest.raises(ShardError, match="at most 100 letters of name and 8 GiB"):
        tar_header(name, length)


def test_writer_returns_the_offsets_of_its_members(tmp_path):
    path = tmp_path / "a.tar"
    contents = {"a.jpg": b"x" * 512, "a.json": b"", "b.jpg": b"y" * 513}
    with path.open("wb") as file:
        tar = TarWriter(file)
        members = [tar.add(name, content) for name, content in contents.items()]
        digest = tar.finish()
    assert members == scan_tar(path)
    assert (tar.bytes, digest) == (path.stat().st_size, file_digest(path))
    with tarfile.open(path) as read:
        assert {member.name: read.extractfile(member).read() for member in read} == contents


@pytest.mark.parametrize("kind", "0LxSZ")  # a file, a long name, more about a file, a file with holes, unknown
@pytest.mark.parametrize("size", [-512, -1, 1 << 33, 1 << 62, 1 << 64])
@pytest.mark.parametrize("number", [0, 1])
def test_damaged_size_of_any_entry_is_refused(tmp_path, kind, size, number):
    """Python's reader raises ValueError, OverflowError, MemoryError or EINVAL for them, or loops for ever."""
    info = tarfile.TarInfo("b.jpg")
    info.size, info.type = size, kind.encode()
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        tar = TarWriter(file)
        tar.add("a.jpg", b"x" * 600)
        tar.finish()
    content = bytearray(path.read_bytes())
    position = 1536 * number  # of the first file or of what follows it
    content[position : position + BLOCK] = info.tobuf(tarfile.GNU_FORMAT)[-BLOCK:]
    path.write_bytes(content)
    with pytest.raises(ShardError, match="not a whole tar"):
        scan_tar(path)
