"""Reading and decoding of single samples, with the annotations of the index."""

import io
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from shards.arrays import Floats, Ints
from shards.dataset.manifest import Manifest
from shards.errors import BadSampleError, ShardError
from shards.masks.rle import Masks
from shards.panoptic.segments import TrueSegments
from shards.read.member_reader import MemberReader
from shards.read.segmentations import open_segmentations
from shards.read.segments import SegmentReader, corner_boxes
from shards.rgb import to_rgb


@dataclass(frozen=True, eq=False)
class Sample:
    """One decoded image with its non-crowd annotations or, of a panoptic data set, all its segments.

    image: uint8 [height, width, 3], RGB, writable; EXIF rotation ignored.
    row: row of the image in the index.
    image_id: original id.
    epoch: epoch of the plan (0 in evaluation).
    width, height: pixels.
    boxes_xyxy: float32 [N, 4], pixels, as in the COCO JSON (not clamped to the image, possibly without area).
    labels: int64 [N], labels of the manifest.
    annotations: int64 [N], rows of the annotations in the index.
    masks: bool [N, height, width], in the order of the boxes; None unless `ReadConfig.masks`.
    panoptic: boxes are those of pixels, the far side being the last one; a segment that is one pixel wide has no area.
    """

    image: npt.NDArray[np.uint8]
    row: int
    image_id: int
    epoch: int
    width: int
    height: int
    boxes_xyxy: npt.NDArray[np.float32]
    labels: Ints
    annotations: Ints
    masks: Masks | None = None
    panoptic: bool = False


class SampleReader:
    """Reader of single samples; safe to share between threads.

    masks: also read the masks. lenient: read samples of a damaged shard one by one instead of failing.
    """

    def __init__(self, manifest: Manifest, *, masks: bool = False, lenient: bool = False) -> None:
        self._index = manifest.index()
        self._members = MemberReader(manifest, lenient=lenient)
        self._segmentations = open_segmentations(manifest, self._members) if masks else None
        self._segments = SegmentReader(manifest, self._members) if manifest.panoptic else None

    def read(self, row: int, epoch: int = 0) -> Sample:
        """Return the sample of one row; raise `BadSampleError` if its bytes changed or are not an image.

        An `OSError` during the fetch passes unchanged: a retry may succeed.
        """
        record = self._index.images[row]
        annotations = self._index.annotations_of(row)
        panoptic = self._segments is not None
        kept = np.arange(len(annotations)) if panoptic else np.flatnonzero(annotations["iscrowd"] == 0)
        width, height = int(record["width"]), int(record["height"])
        content, text = self._read_bytes(row)
        image = self._decode(row, content)
        if image.shape != (height, width, 3):
            raise BadSampleError(f"{self.name(row)}: decodes to {image.shape}, expected {(height, width, 3)}")
        return Sample(
            image=image,
            row=int(row),
            image_id=int(record["image_id"]),
            epoch=int(epoch),
            width=width,
            height=height,
            boxes_xyxy=corner_boxes(annotations) if panoptic else _boxes(annotations["bbox"][kept]),
            labels=annotations["label"][kept].astype(np.int64),
            annotations=int(record["first"]) + kept,
            masks=None if self._segmentations is None else self._segmentations.masks(row, text),
            panoptic=panoptic,
        )

    def segments(self, row: int) -> TrueSegments:
        """Return the true segments of one row of a panoptic data set, crowds included; raise as `read`."""
        if self._segments is None:
            raise ShardError(
                "got a data set of boxes, expected a panoptic one, as written by `detr shard coco-panoptic`"
            )
        return self._segments.segments(row, self._members.segmentations(row))

    def name(self, row: int) -> str:
        """Return the name of a sample in messages: image id and shard."""
        return self._members.name(row)

    def close(self) -> None:
        """Close the shards' files."""
        self._members.close()

    def _read_bytes(self, row: int) -> tuple[bytes, bytes]:
        """Return the image and, if masks are read, its segmentations."""
        if self._segmentations is None:
            return self._members.image(row), b""
        return self._members.image_and_segmentations(row)

    def _decode(self, row: int, content: bytes) -> npt.NDArray[np.uint8]:
        with error_context(self, row, BadSampleError):
            return decode(content)


def _boxes(boxes: Floats) -> npt.NDArray[np.float32]:
    """Return x, y, width, height as xyxy."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32)


def decode(content: bytes) -> npt.NDArray[np.uint8]:
    """Return an image file's pixels, uint8 [height, width, 3], RGB, writable; EXIF rotation ignored.

    JPEGs are decoded directly into the array, which gives the same pixels as Pillow in half the time.
    """
    if _colours(content) in ("YCbCr", "RGB", "Gray"):
        return cast(npt.NDArray[np.uint8], simplejpeg.decode_jpeg(content, "RGB"))
    with Image.open(io.BytesIO(content)) as image:
        # A copy, because Pillow's own memory would be read-only.
        return np.array(image if image.mode == "RGB" else to_rgb(image))


def _colours(content: bytes) -> str:
    """Return the colour space of a JPEG by simplejpeg's name, or "" if simplejpeg cannot read the file."""
    try:
        return str(simplejpeg.decode_jpeg_header(content)[2])
    except ValueError:
        return ""


@contextmanager
def error_context(reader: SampleReader, row: int, kind: type[ShardError] = ShardError) -> Generator[None, None, None]:
    """Raise `kind`, naming the sample, for an error in the block.

    The block must not fetch bytes: errors of the network and a lack of memory may pass, and are not the sample's.
    """
    try:
        yield
    except (ShardError, MemoryError):
        raise
    except Exception as error:
        raise kind(f"{reader.name(row)}: {type(error).__name__}: {error}") from error
