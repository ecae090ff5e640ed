"""PNGs of segment ids: three bytes of a pixel, and refusals before anything is decoded."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from shards.errors import ShardError
from shards.panoptic.segment_png import MAX_SEGMENT_ID, SegmentPngError, read_ids, write_png


def saved(mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (4, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def test_ids_of_three_bytes_come_back() -> None:
    ids = np.random.default_rng(0).integers(0, MAX_SEGMENT_ID + 1, (17, 31))
    ids[0, :3] = 0, 1, MAX_SEGMENT_ID
    content = write_png(ids)
    found = read_ids(content)
    assert found.dtype == np.uint32
    assert np.array_equal(found, ids)
    red, green, blue = np.moveaxis(np.asarray(Image.open(io.BytesIO(content))).astype(int), -1, 0)
    assert np.array_equal(red + 256 * green + 65536 * blue, ids)


@pytest.mark.parametrize("wrong", [-1, MAX_SEGMENT_ID + 1])
def test_ids_that_three_bytes_do_not_hold_are_refused(wrong: int) -> None:
    with pytest.raises(ShardError, match=rf"ids from .*{wrong}"):
        write_png(np.array([[0, wrong]]))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (saved("L"), "has 8 bits of grey; expected 8 bits of RGB"),
        (saved("P"), "has 1 bits of a palette"),
        (saved("RGBA"), "has 8 bits of RGB with transparency"),
        (saved("I;16"), "has 16 bits of grey"),
        (b"", "has 0 bytes"),
        (b"\xff\xd8\xff" + bytes(40), "is not a PNG"),
        (write_png(np.arange(4000).reshape(40, 100))[:-60], "is truncated or damaged"),
    ],
)
def test_other_files_are_refused(content: bytes, problem: str) -> None:
    with pytest.raises(SegmentPngError, match=problem):
        read_ids(content)


def test_a_huge_size_in_the_header_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    content = saved("RGB")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(SegmentPngError, match="100000x100000 pixels"):
        read_ids(content[:16] + struct.pack(">II", 100_000, 100_000) + content[24:])


def test_a_second_header_is_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    content, other = saved("RGB"), io.BytesIO()
    Image.new("RGB", (400, 300)).save(other, "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(SegmentPngError, match="a second header says 400x300 pixels"):
        read_ids(content[:33] + other.getvalue()[8:])
