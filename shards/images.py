"""Image files, read once and decoded strictly once, so that a damaged one is found here and not in mid-training.

Pillow and OpenCV hand out grey blocks for most damage to a JPEG and say nothing; libjpeg's warnings, taken for errors,
tell. JPEGs are decoded at an eighth of their size, which reads every byte of the compressed data as at full size.
"""

import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from shards import storage
from shards.defects import Defect
from shards.errors import ShardError, one_line

# File extensions by Pillow's name of the format; MPO is what some cameras call a JPEG with a second picture inside.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
_SAME = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif", "dib": "bmp"}
# What is said of an image whose colours are not those of its file, by the kind of the note.
COLOURS = {
    "cmyk": "is CMYK; it is read as RGB",
    "grey": "is grey; it is read as RGB",
    "16-bit": "is grey of 16 bits; it is read as RGB of the upper 8",
    "alpha": "has transparency; it is read as RGB without it",
}
NO_FILE = -1  # instead of a checksum
_ORIENTATION = 0x0112  # of EXIF; 1 is upright
# Pillow warns of large pictures, which are no attack here, and of odd metadata, which nothing here reads. Once for the
# process, as `warnings.catch_warnings` is not for threads: one that leaves it brings back what another one set.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageSource(NamedTuple):
    """What a source says about an image: file name relative to its folder, size in pixels."""

    image_id: int
    name: str
    width: int
    height: int


@dataclass(frozen=True)
class ImageFile:
    """An image file's bytes and their checksum, the extension that they deserve, and what is wrong or worth knowing."""

    content: bytes
    crc32: int
    extension: str
    defects: tuple[Defect, ...]

    @property
    def sound(self) -> bool:
        """Whether it can be used."""
        return not any(defect.rejected for defect in self.defects)


class Unfit(Exception):
    """Why an image cannot be used: the kind of defect, and the words for it."""


@dataclass(frozen=True)
class Look:
    """What decoding showed: Pillow's name of the format, size in pixels, colours, EXIF orientation."""

    format: str
    size: tuple[int, int]
    colours: str  # a key of COLOURS, or ""
    orientation: int = 1


def read_content(folder: str, name: str) -> bytes | None:
    """An image file's bytes; None where there is no such file.

    Raises ShardError where it is there and cannot be read, which is no fault of the data set's.
    """
    url = storage.join(folder, name)
    try:
        return storage.read(url)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except OSError as error:
        raise ShardError(
            f"{url}: cannot be read: {error}; check its permissions and the disk, then run again"
        ) from error


def read_image(folder: str, source: ImageSource) -> ImageFile:
    """Read and decode an image file. The content is empty where there is none."""
    who = f"image {source.image_id} ({source.name})"
    content = read_content(folder, source.name)

    def defect(kind: str, problem: str) -> Defect:
        return Defect(f"{who}: {problem}", kind, source.image_id)

    if content is None:
        return ImageFile(b"", NO_FILE, "", (defect("missing-file", "no such file in the folder of images"),))
    crc32 = checksum(content)
    try:
        look = look_at(content)
        if look.size != (source.width, source.height):
            raise Unfit(
                "wrong-size",
                f"is {look.size[0]}x{look.size[1]} pixels (before any EXIF rotation), but the JSON says "
                f"{source.width}x{source.height}",
            )
    except Unfit as error:
        return ImageFile(content, crc32, "", (defect(*error.args),))
    extension = EXTENSIONS[look.format]
    notes = []
    named = PurePosixPath(source.name).suffix.lower().removeprefix(".")
    if named and _SAME.get(named, named) != extension:
        notes.append(defect("misnamed", f"is a {look.format} file; in the shards it is called .{extension}"))
    if look.orientation != 1:
        notes.append(
            defect(
                "exif-orientation",
                f"its EXIF orientation {look.orientation} is ignored, as the boxes are of the pixels",
            )
        )
    if look.colours:
        notes.append(defect(look.colours, COLOURS[look.colours]))
    return ImageFile(content, crc32, extension, tuple(notes))


def to_rgb(image: Image.Image) -> Image.Image:
    """A copy of a picture as RGB of 8 bits; transparency is dropped, and of 16-bit grey PNGs the upper 8 bits are taken.

    Raises ValueError for other grey of more than 8 bits: Pillow cuts it off at 255, so that it is white or black, and
    nothing says what its brightest value means.
    """
    if image.mode == "I;16" and image.format == "PNG":
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        raise ValueError(
            f"its pixels are grey of more than 8 bits ({image.format} of Pillow's mode {image.mode}); expected 8 bits per "
            "channel, or a PNG of 16-bit grey: convert it"
        )
    return image.convert("RGB")


def checksum(content: bytes | None) -> int:
    """crc32 of a file's bytes; ``NO_FILE`` for none."""
    return NO_FILE if content is None else zlib.crc32(content)


def look_at(content: bytes) -> Look:
    """Decode an image, all of it; raises Unfit with the kind of defect and the words for it where that cannot be done."""
    if not content:
        raise Unfit("truncated", "the file is empty")
    return _decode_jpeg(content) if content.startswith(b"\xff\xd8") else _decode_other(content)


def _decode_jpeg(content: bytes) -> Look:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        four = colours in ("CMYK", "YCCK")
        simplejpeg.decode_jpeg(
            content, "CMYK" if four else "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8
        )
    except ValueError as error:
        if "subsampling" in str(error):  # valid, but TurboJPEG's interface has no name for it
            return _decode_other(content)
        kind = "truncated" if "Premature end of JPEG file" in str(error) else "corrupt"
        raise Unfit(kind, f"cannot be decoded: {one_line(error)}") from None
    return Look("JPEG", (width, height), "cmyk" if four else "grey" if colours == "Gray" else "", _orientation(content))


def _orientation(content: bytes) -> int:
    if content.find(b"Exif\0\0", 0, 1 << 16) < 0:  # looked for first, as Pillow takes longer to open than this to find
        return 1
    try:
        with Image.open(io.BytesIO(content)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data say nothing; the pixels were decoded
        return 1


def _decode_other(content: bytes) -> Look:
    try:
        with Image.open(io.BytesIO(content)) as image:
            kind, size = image.format or "", image.size
            if kind not in EXTENSIONS:
                raise Unfit("unknown-format", f"its format {kind} is none of {', '.join(EXTENSIONS)}")
            image.load()
            colours = _colours(image)
            orientation = int(image.getexif().get(_ORIENTATION, 1))
    except Unfit:
        raise
    except UnidentifiedImageError:
        raise Unfit("not-an-image", "is not an image that Pillow can read") from None
    except Exception as error:  # Pillow's plugins raise nearly anything for damaged bytes
        cut = "truncated" in str(error)
        raise Unfit("truncated" if cut else "corrupt", f"cannot be decoded: {one_line(error)}") from None
    return Look(kind, size, colours, orientation)


def _colours(image: Image.Image) -> str:
    """A key of COLOURS, or "" for RGB; raises Unfit where ``to_rgb`` does."""
    if image.mode in ("CMYK", "1", "L"):
        return "cmyk" if image.mode == "CMYK" else "grey"
    if image.mode == "F" or image.mode.startswith("I"):
        try:
            to_rgb(image)
        except ValueError as error:
            raise Unfit("unknown-format", str(error)) from None
        return "16-bit"
    return "alpha" if image.has_transparency_data else ""
