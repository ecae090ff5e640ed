"""Kinds of rows in requests to a served version, right and wrong, with the answer to expect."""

import base64
import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64


@dataclass(frozen=True)
class Kind:
    """Rows of a request: sizes of the pictures in its answer, or a pattern of the message that refuses it."""

    name: str
    rows: tuple[str | None, ...]
    sizes: tuple[tuple[int, int], ...] = ()
    refusal: str = ""


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def encoded(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_of(width: int, height: int, *, pixels: bytes = b"") -> bytes:
    """Return a PNG that announces a size, whatever its pixels are."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def kinds(width: int = WIDTH, height: int = HEIGHT) -> list[Kind]:
    """Return every kind, with pictures of that size."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], axis=2)
    picture = Image.fromarray(pixels.astype(np.uint8))
    grey = (np.asarray(picture.convert("L")).astype(np.uint16) << 8) + 7
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg = encoded(picture)
    size, unreadable = ((width, height),), r"row 0: not a picture that can be read"
    right = {
        "JPEG": jpeg,
        "CMYK": encoded(picture.convert("CMYK")),
        "alpha": encoded(picture.convert("RGBA"), "PNG"),
        "grey": encoded(picture.convert("L")),
        "16-bit grey": encoded(Image.fromarray(grey), "PNG"),
        "WebP": encoded(picture, "WEBP"),
    }
    found = [Kind(name, (base64_of(content),), size) for name, content in right.items()]
    found.append(Kind("EXIF", (base64_of(encoded(picture, exif=turned)),), ((height, width),)))
    found.append(Kind("data: URL", ("data:image/jpeg;base64," + base64_of(jpeg),), size))
    found.append(Kind("no row", (), ()))
    wrong: dict[str, tuple[str | None, str]] = {
        "truncated": (base64_of(jpeg[: len(jpeg) * 9 // 10]), unreadable + ": it is truncated or damaged"),
        "text": (base64_of(b"no picture"), unreadable + "; expected JPEG"),
        "empty": ("", r"row 0: empty"),
        "garbage": ("*" * 64, r"row 0: not base64"),
        "lines": (base64_of(jpeg)[:76] + "\n" + base64_of(jpeg)[76:], r"row 0: not base64.*line breaks"),
        "null": (None, r"row 0: null or no string"),
        "URL": ("https://example.org/image.jpg", r"row 0: not base64"),
        "400 megapixels": (base64_of(png_of(20_000, 20_000)), r"row 0: more than 89 megapixels"),
    }
    found += [Kind(name, (row,), refusal=refusal) for name, (row, refusal) in wrong.items()]
    two = (base64_of(jpeg), wrong["text"][0])
    found.append(Kind("two rows, one broken", two, refusal=r"^row 1: not a picture.*\(1 of 2 rows are right\)$"))
    return found
