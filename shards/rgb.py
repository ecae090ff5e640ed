"""Pictures to RGB: the conversion that training and serving share, and the checks of pictures that a user hands in.

Such a picture comes from anywhere, so only the formats of data sets are opened, and its size is checked before its pixels
are decoded. Data sets are not read this way: their boxes are of the pixels as stored.
"""

import contextlib
import warnings
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps

from shards.errors import PictureError, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Formats that are read, by Pillow's names; MPO is opened as JPEG. Pillow knows more; one of them starts Ghostscript."""
MAX_PIXELS = 89_478_485
"""Largest picture that is decoded: 256 MiB as RGB. Pillow warns above it, and refuses twice as much."""

Exif = Literal["upright", "ignore"]
"""Use of the EXIF orientation: the picture is turned as the camera was held, or stays as its pixels are stored."""

_UNREADABLE = "not a picture that can be read; expected JPEG, PNG, WebP, BMP, GIF or TIFF"
_TOO_LARGE = f"more than {MAX_PIXELS / 1e6:.0f} megapixels; scale it down, the detector does so anyway"

# Pillow warns about pictures above MAX_PIXELS, which are refused here, and about odd metadata, which is not used here.
warnings.filterwarnings("ignore", module=r"PIL\.")


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a copy of an image as RGB of 8 bits, without transparency; a 16-bit grey PNG gives its upper 8 bits.

    Raise `ValueError` for other grey images of more than 8 bits: Pillow would clip them at 255, to black and white, and
    the file does not say which value is the brightest.
    """
    if image.mode == "I;16" and image.format == "PNG":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(
            f"its pixels are grey of more than 8 bits ({image.format} of Pillow's mode {image.mode}); expected 8 bits per "
            "channel, or a PNG of 16-bit grey: convert it"
        )
    return image.convert("RGB")


def open_picture(file: Path | BinaryIO) -> Image.Image:
    """Open a picture without decoding its pixels.

    Raise `PictureError` for another format and for too many pixels, `OSError` if the file cannot be read.
    """
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise PictureError(_TOO_LARGE) from None
    except Exception as error:  # Pillow's plugins raise many kinds of errors for damaged bytes
        if isinstance(error, OSError) and error.errno is not None:  # no such file, no access
            raise
        raise PictureError(_UNREADABLE) from None
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise PictureError(_TOO_LARGE)
    return image


def decode_picture(image: Image.Image, exif: Exif = "upright") -> Image.Image:
    """Return an opened picture as RGB; raise `PictureError` if its pixels are damaged or cannot be RGB."""
    try:
        image.load()
    except Exception:  # Pillow's decoders raise errors of many kinds for damaged bytes, and each means the same here
        raise PictureError("not a picture that can be read: it is truncated or damaged") from None
    if exif == "upright":
        with contextlib.suppress(Exception):  # damaged EXIF data; the pixels were decoded
            ImageOps.exif_transpose(image, in_place=True)  # in place, since `to_rgb` asks for the format
    try:
        return to_rgb(image)
    except ValueError as error:
        raise PictureError(f"not a picture that can be read: {one_line(error)}") from None
