"""One sample: its bytes, decoded, with the annotations of the index."""

import io
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from shards.errors import BadSampleError, ShardError
from shards.images import to_rgb
from shards.index import Ints
from shards.manifest import Manifest
from shards.members import Members
from shards.segmentation import Masks, SegmentationReader


@dataclass(frozen=True, eq=False)
class Sample:
    """One decoded image with its non-crowd annotations.

    Attributes:
        image: uint8 [height, width, 3], RGB, writable; EXIF rotation ignored.
        row: its row in the index.
        image_id: original id.
        epoch: the epoch it is shown in (0 in evaluation).
        width, height: pixels.
        boxes_xyxy: float32 [N, 4], pixels, as the COCO JSON says (not clamped, possibly without area).
        labels: int64 [N], labels of the manifest.
        annotations: int64 [N], their rows in the index.
        masks: bool [N, height, width], in the order of the boxes; None unless ``ReadConfig.masks`` asks for them.
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


class SampleReader:
    """Reads and decodes single samples, with their masks where asked to; safe to share between threads."""

    def __init__(self, manifest: Manifest, *, masks: bool = False, lenient: bool = False) -> None:
        """``masks``: read them as well. ``lenient``: go on past a cache where a shard is not the manifest's."""
        self._index = manifest.index()
        self._members = Members(manifest, lenient=lenient)
        self._segmentations = SegmentationReader(manifest, self._members) if masks else None

    def read(self, row: int, epoch: int = 0) -> Sample:
        """The sample of one row; raises BadSampleError where its bytes are not those that were written.

        An OSError while the bytes are fetched passes as it is: trying again may mend it.
        """
        record = self._index.images[row]
        annotations = self._index.annotations_of(row)
        kept = np.flatnonzero(annotations["iscrowd"] == 0)
        boxes = annotations["bbox"][kept]
        width, height = int(record["width"]), int(record["height"])
        content, text = (self._members.image(row), b"") if self._segmentations is None else self._members.both(row)
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
            boxes_xyxy=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32),
            labels=annotations["label"][kept].astype(np.int64),
            annotations=int(record["first"]) + kept,
            masks=None if self._segmentations is None else self._segmentations.masks(row, text),
        )

    def name(self, row: int) -> str:
        """How messages call a sample."""
        return self._members.name(row)

    def close(self) -> None:
        """Let go of the shards' files."""
        self._members.close()

    def _decode(self, row: int, content: bytes) -> npt.NDArray[np.uint8]:
        with naming(self, row, BadSampleError):
            return decode(content)


def decode(content: bytes) -> npt.NDArray[np.uint8]:
    """An image file's pixels, uint8 [height, width, 3], RGB, writable; EXIF rotation ignored.

    JPEGs go straight into the array: the same pixels as through Pillow in half the time.
    """
    if _colours(content) in ("YCbCr", "RGB", "Gray"):
        return cast(npt.NDArray[np.uint8], simplejpeg.decode_jpeg(content, "RGB"))
    with Image.open(io.BytesIO(content)) as image:
        # A copy, because Pillow's own memory would be read-only.
        return np.array(image if image.mode == "RGB" else to_rgb(image))


def _colours(content: bytes) -> str:
    """The colours of a JPEG that simplejpeg can read; those of others, CMYK above all, are left to Pillow."""
    try:
        return str(simplejpeg.decode_jpeg_header(content)[2])
    except ValueError:
        return ""


@contextmanager
def naming(reader: SampleReader, row: int, kind: type[ShardError] = ShardError) -> Generator[None, None, None]:
    """What goes wrong with bytes that were read is the sample's fault and happens again, so it names the sample.

    Reading stays outside: a network that is away or a lack of memory passes, and its error must be told apart.
    """
    try:
        yield
    except (ShardError, MemoryError):
        raise
    except Exception as error:
        raise kind(f"{reader.name(row)}: {type(error).__name__}: {error}") from error
