"""Codec of COCO's panoptic PNGs: 8-bit RGB, where R + 256 G + 65536 B is the id of a pixel's segment, and 0 is VOID."""

import io
import struct

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.errors import ShardError, one_line
from shards.rgb import MAX_PIXELS

SegmentIds = npt.NDArray[np.uint32]
MAX_SEGMENT_ID = 2**24 - 1
VOID = 0

# The first 26 bytes of every PNG: signature, length and name of the header, width, height, bits, colour type.
_HEADER = struct.Struct(">8s4s4sIIBB")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOURS = {0: "grey", 2: "RGB", 3: "a palette", 4: "grey with transparency", 6: "RGB with transparency"}


class SegmentPngError(ShardError):
    """Raised for bytes that are no PNG of segment ids; the message continues "its PNG"."""


def read_ids(content: bytes) -> SegmentIds:
    """Return the segment id of each pixel, uint32 [height, width]; raise `SegmentPngError` for another kind of file.

    Format and size are read from the header before anything is decoded.
    """
    width, height = png_size(content)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if (image.mode, *image.size) != ("RGB", width, height):  # two headers, of which Pillow takes the second
                raise ValueError(f"a second header says {image.width}x{image.height} pixels of {image.mode}")
            image.load()
            pixels = np.asarray(image)
    except Exception as error:  # Pillow raises errors of many kinds for damaged bytes, and each means the same here
        raise SegmentPngError(f"is truncated or damaged ({one_line(error)}): copy it again") from None
    colours = np.zeros((height, width, 4), np.uint8)
    colours[..., :3] = pixels
    return colours.view("<u4")[..., 0].astype(np.uint32, copy=False)


def write_png(ids: npt.NDArray[np.integer]) -> bytes:
    """Return the PNG of segment ids [height, width]; raise `ShardError` for an id that three bytes do not hold."""
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if low < 0 or high > MAX_SEGMENT_ID:
        raise ShardError(f"got segment ids from {low} to {high}, expected 0..{MAX_SEGMENT_ID}, which a PNG can hold")
    colours = np.ascontiguousarray(ids, "<u4").view(np.uint8).reshape(*ids.shape, 4)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(colours[..., :3])).save(buffer, "PNG")
    return buffer.getvalue()


def png_size(content: bytes) -> tuple[int, int]:
    """Return width and height of a PNG of segment ids; raise `SegmentPngError` if its header is another's."""
    if len(content) < _HEADER.size:
        raise SegmentPngError(f"has {len(content)} bytes; expected an 8-bit RGB PNG: copy it again")
    signature, _, name, width, height, bits, colour = _HEADER.unpack_from(content)
    if signature != _SIGNATURE or name != b"IHDR":
        raise SegmentPngError("is not a PNG; expected an 8-bit RGB PNG of segment ids")
    if (bits, colour) != (8, 2):
        raise SegmentPngError(f"has {bits} bits of {_COLOURS.get(colour, 'unknown colours')}; expected 8 bits of RGB")
    if width * height > MAX_PIXELS:
        raise SegmentPngError(f"says that it has {width}x{height} pixels; expected at most {MAX_PIXELS}")
    return width, height
