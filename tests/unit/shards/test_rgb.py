"""Pictures that a user hands in: the formats that are opened, the limit on their pixels, their orientation."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards import rgb
from shards.errors import PictureError
from shards.rgb import FORMATS, MAX_PIXELS, decode_picture, open_picture


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def png_header(width: int, height: int) -> io.BytesIO:
    """A PNG that announces a size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in ((b"IHDR", header), (b"IDAT", b""))
    ]
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_read(form: str) -> None:
    picture = decode_picture(open_picture(encoded(Image.new("RGB", (50, 30), "red"), form)))
    assert (picture.mode, picture.size) == ("RGB", (50, 30))
    assert np.abs(np.asarray(picture).astype(int) - (255, 0, 0)).max() <= 2


def test_a_format_that_starts_a_program_is_not_opened() -> None:
    with pytest.raises(PictureError, match="not a picture that can be read; expected JPEG, PNG"):
        open_picture(encoded(Image.new("RGB", (50, 30), "red"), "EPS"))


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff\xe0garbage", b"\x89PNG\r\n\x1a\ngarbage"])
def test_other_bytes_are_no_picture(content: bytes) -> None:
    with pytest.raises(PictureError, match="not a picture that can be read"):
        open_picture(io.BytesIO(content))


def test_a_truncated_picture_is_named_as_such() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    content = encoded(noise).getvalue()
    with pytest.raises(PictureError, match="not a picture that can be read: it is truncated or damaged"):
        decode_picture(open_picture(io.BytesIO(content[: len(content) // 2])))


@pytest.mark.parametrize("size", [(20_000, 20_000), (10_000, 10_000), (MAX_PIXELS + 1, 1)])
def test_too_many_pixels_are_refused_before_one_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(PictureError, match="more than 89 megapixels; scale it down"):
        open_picture(png_header(*size))


def test_the_limit_itself_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_picture(png_header(MAX_PIXELS, 1)).size == (MAX_PIXELS, 1)
    monkeypatch.setattr(rgb, "MAX_PIXELS", 1499)
    with pytest.raises(PictureError):
        open_picture(encoded(Image.new("RGB", (50, 30))))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("exif", "size"), [("upright", (30, 50)), ("ignore", (50, 30))])
def test_a_picture_of_a_turned_camera_is_turned_upright_unless_exif_is_ignored(
    mode: str, exif: rgb.Exif, size: tuple[int, int]
) -> None:
    image = Image.new(mode, (50, 30), "black")
    image.paste("white", (0, 0, 10, 10))  # upright it is at the top right: 6 is a quarter turn to the right
    orientation = Image.Exif()
    orientation[0x0112] = 6
    picture = decode_picture(open_picture(encoded(image, exif=orientation)), exif)
    assert picture.size == size
    bright = np.argwhere(np.asarray(picture)[..., 0] > 128)
    assert tuple(bright.min(0)) == ((0, 20) if exif == "upright" else (0, 0))


def test_grey_of_16_bits_is_turned_too() -> None:
    orientation = Image.Exif()
    orientation[0x0112] = 6
    image = Image.fromarray(np.full((30, 50), 40_000, np.uint16))
    picture = decode_picture(open_picture(encoded(image, "PNG", exif=orientation)))
    assert picture.size == (30, 50)
    assert np.unique(np.asarray(picture)).tolist() == [40_000 >> 8]


@pytest.mark.parametrize("problem", [SyntaxError("not a TIFF file"), struct.error("requires 2 bytes")])
def test_damaged_exif_data_leave_the_picture_as_it_is(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise problem

    monkeypatch.setattr(ImageOps, "exif_transpose", fail)
    assert decode_picture(open_picture(encoded(Image.new("RGB", (50, 30))))).size == (50, 30)


def test_grey_of_32_bits_is_refused_with_the_reason() -> None:
    image = Image.fromarray(np.full((30, 50), 7, np.int32))
    with pytest.raises(PictureError, match="grey of more than 8 bits"):
        decode_picture(open_picture(encoded(image, "TIFF")))


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_picture(tmp_path / "none.jpg")
