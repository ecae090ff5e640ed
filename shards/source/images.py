"""Strict decoding of the source's image files, so that damage is found when shards are written, not during training.

Pillow and OpenCV silently return grey blocks for most damage to a JPEG. simplejpeg treats libjpeg's warnings as errors.
JPEGs are decoded at an eighth of their size, which still reads all of the compressed data.
"""

import io
import warnings
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

import simplejpeg
from PIL import Image, UnidentifiedImageError

from shards.errors import ShardError, one_line
from shards.rgb import to_rgb
from shards.source.defects import Defect
from shards.store import storage

# File extensions by Pillow's name of the format; MPO is a JPEG with a second picture inside, which some cameras write.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
_SAME = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif", "dib": "bmp"}

# Messages about images that are converted to RGB, by the kind of the note.
COLOURS = {
    "cmyk": "is CMYK; it is read as RGB",
    "grey": "is grey; it is read as RGB",
    "16-bit": "is grey of 16 bits; it is read as RGB of the upper 8",
    "alpha": "has transparency; it is read as RGB without it",
}
NO_FILE = -1  # instead of a checksum
_ORIENTATION = 0x0112  # EXIF tag; 1 is upright


# Pillow warns about large pictures, which are no attack here, and about odd metadata, which is not used here. Ignored
# for the whole process, because `warnings.catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageSource(NamedTuple):
    """An image as listed in the source: file name relative to the folder of images, size in pixels."""

    image_id: int
    name: str
    width: int
    height: int


@dataclass(frozen=True)
class ImageFile:
    """An image file's bytes, their checksum, the extension of their actual format, and the image's defects."""

    content: bytes
    crc32: int
    extension: str
    defects: tuple[Defect, ...]

    @property
    def sound(self) -> bool:
        """True if the image can be used."""
        return not any(defect.rejected for defect in self.defects)


class UnusableImage(Exception):
    """Raised for an unusable image; its arguments are the kind of the defect and the message."""


@dataclass(frozen=True)
class DecodedInfo:
    """Properties of a decoded image: Pillow's name of the format, size in pixels, colours, EXIF orientation."""

    format: str
    size: tuple[int, int]
    colours: str  # a key of COLOURS, or ""
    orientation: int = 1


def read_content(folder: str, name: str) -> bytes | None:
    """Return an image file's bytes, or None if the file does not exist.

    Raise `ShardError` if it exists but cannot be read: that is not a defect of the source.
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
    """Read and decode an image file; the content is empty if the file does not exist."""
    name = f"image {source.image_id} ({source.name})"
    content = read_content(folder, source.name)

    def defect(kind: str, problem: str) -> Defect:
        return Defect(f"{name}: {problem}", kind, source.image_id)

    if content is None:
        return ImageFile(b"", NO_FILE, "", (defect("missing-file", "no such file in the folder of images"),))
    crc32 = checksum(content)
    try:
        info = inspect_image(content)
        if info.size != (source.width, source.height):
            raise UnusableImage(
                "wrong-size",
                f"is {info.size[0]}x{info.size[1]} pixels (before any EXIF rotation), but the JSON says "
                f"{source.width}x{source.height}",
            )
    except UnusableImage as error:
        return ImageFile(content, crc32, "", (defect(*error.args),))
    extension = EXTENSIONS[info.format]
    notes = []
    suffix = PurePosixPath(source.name).suffix.lower().removeprefix(".")
    if suffix and _SAME.get(suffix, suffix) != extension:
        notes.append(defect("misnamed", f"is a {info.format} file; in the shards it is called .{extension}"))
    if info.orientation != 1:
        notes.append(
            defect(
                "exif-orientation",
                f"its EXIF orientation {info.orientation} is ignored, as the boxes are of the pixels",
            )
        )
    if info.colours:
        notes.append(defect(info.colours, COLOURS[info.colours]))
    return ImageFile(content, crc32, extension, tuple(notes))


def checksum(content: bytes | None) -> int:
    """Return the crc32 of a file's bytes, or `NO_FILE` for None."""
    return NO_FILE if content is None else zlib.crc32(content)


def inspect_image(content: bytes) -> DecodedInfo:
    """Decode a complete image; raise `UnusableImage` with the kind of the defect and a message if that fails."""
    if not content:
        raise UnusableImage("truncated", "the file is empty")
    return _decode_jpeg(content) if content.startswith(b"\xff\xd8") else _decode_other(content)


def _decode_jpeg(content: bytes) -> DecodedInfo:
    try:
        height, width, colour_space, _ = simplejpeg.decode_jpeg_header(content)
        if colour_space in ("CMYK", "YCCK"):
            target, colours = "CMYK", "cmyk"
        else:
            target, colours = "GRAY", "grey" if colour_space == "Gray" else ""
        simplejpeg.decode_jpeg(content, target, fastdct=True, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        if "subsampling" in str(error):  # valid, but TurboJPEG's interface has no name for it
            return _decode_other(content)
        kind = "truncated" if "Premature end of JPEG file" in str(error) else "corrupt"
        raise UnusableImage(kind, f"cannot be decoded: {one_line(error)}") from None
    return DecodedInfo("JPEG", (width, height), colours, _orientation(content))


def _orientation(content: bytes) -> int:
    if content.find(b"Exif\0\0", 0, 1 << 16) < 0:  # much faster than opening the image with Pillow
        return 1
    try:
        with Image.open(io.BytesIO(content)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the EXIF data are damaged, but the pixels were decoded
        return 1


def _decode_other(content: bytes) -> DecodedInfo:
    try:
        with Image.open(io.BytesIO(content)) as image:
            name, size = image.format or "", image.size
            if name not in EXTENSIONS:
                raise UnusableImage("unknown-format", f"its format {name} is none of {', '.join(EXTENSIONS)}")
            image.load()
            colours = _colours(image)
            orientation = int(image.getexif().get(_ORIENTATION, 1))
    except UnusableImage:
        raise
    except UnidentifiedImageError:
        raise UnusableImage("not-an-image", "is not an image that Pillow can read") from None
    except Exception as error:  # Pillow's plugins raise many kinds of errors for damaged bytes
        kind = "truncated" if "truncated" in str(error) else "corrupt"
        raise UnusableImage(kind, f"cannot be decoded: {one_line(error)}") from None
    return DecodedInfo(name, size, colours, orientation)


def _colours(image: Image.Image) -> str:
    """Return a key of COLOURS, or "" for RGB; raise `UnusableImage` if `to_rgb` cannot convert the image."""
    if image.mode == "CMYK":
        return "cmyk"
    if image.mode in ("1", "L"):
        return "grey"
    if image.mode == "F" or image.mode.startswith("I"):
        try:
            to_rgb(image)
        except ValueError as error:
            raise UnusableImage("unknown-format", str(error)) from None
        return "16-bit"
    return "alpha" if image.has_transparency_data else ""
