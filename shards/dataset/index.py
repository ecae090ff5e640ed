"""Index of a data set: one record per image and one per annotation, in arrays that are mapped into memory.

A *row* is an image's position in `index/images.npy`.
"""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.arrays import Ints, Records
from shards.errors import ShardError

# `shard`, `offset`, `length`, `crc32`: location and checksum of the encoded image; `text_*`: the same of the sample's
# segmentation.json (length 0 if it has none) or, in a panoptic data set, of its segments.png. `first`, `count`: its
# annotations. Sizes in pixels.
IMAGE_DTYPE = np.dtype(
    [
        ("image_id", "<i8"),
        ("shard", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("first", "<i8"),
        ("count", "<i4"),
        ("crc32", "<u4"),
        ("text_offset", "<i8"),
        ("text_length", "<i4"),
        ("text_crc32", "<u4"),
    ]
)

# `image`: row in images.npy. `bbox`: x, y, width, height in pixels as in the COCO JSON (not clamped to the image). In a
# panoptic data set, `annotation_id` is the segment's id, distinct within its image, and `bbox` is that of its pixels.
ANNOTATION_DTYPE = np.dtype(
    [
        ("annotation_id", "<i8"),
        ("image", "<i4"),
        ("bbox", "<f8", (4,)),
        ("area", "<f8"),
        ("label", "<i4"),
        ("iscrowd", "u1"),
    ]
)


@dataclass(frozen=True, eq=False)
class Index:
    """Memory-mapped arrays of a data set: read-only, and shared by all processes of a machine.

    images: IMAGE_DTYPE [images].
    annotations: ANNOTATION_DTYPE [annotations], those of row r at `first[r] : first[r] + count[r]`.
    learns_crowds: crowds are objects like others, as in the original's panoptic training; its detection drops them.
    """

    images: Records
    annotations: Records
    learns_crowds: bool = False

    @functools.cached_property
    def boxes_per_image(self) -> Ints:
        """Number of objects to learn in each image, int64 [images]."""
        rows = self.annotations["image"]
        if not self.learns_crowds:
            rows = rows[self.annotations["iscrowd"] == 0]
        return np.bincount(rows, minlength=len(self.images)).astype(np.int64)

    @property
    def max_boxes(self) -> int:
        """Maximum number of objects to learn in one image; a model needs at least as many queries."""
        return int(self.boxes_per_image.max(initial=0))

    def annotations_of(self, row: int) -> Records:
        """Return the annotation records of one image, crowds included, in the order of the COCO JSON."""
        record = self.images[row]
        first = int(record["first"])
        return self.annotations[first : first + int(record["count"])]

    def rows_of(self, image_ids: npt.ArrayLike) -> Ints:
        """Return the rows of original image ids, int64 of the same shape; raise `ShardError` naming an unknown id."""
        ids = np.asarray(image_ids, dtype=np.int64)
        order, known = self._by_id
        positions = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        unknown = known[positions] != ids
        if unknown.any():
            raise ShardError(
                f"image id {int(ids[unknown][0])} is not in this data set of {len(known)} images; expected ids of its "
                "own images: use the manifest that the ids come from"
            )
        return order[positions]

    @functools.cached_property
    def _by_id(self) -> tuple[Ints, Ints]:
        """Rows in ascending order of their image ids, and these ids."""
        ids = self.images["image_id"]
        order = np.argsort(ids, kind="stable")
        return order, ids[order]


def find_inconsistency(index: Index, samples: Sequence[int], sizes: Sequence[int], classes: int) -> str | None:
    """Return a message of one line if the index is inconsistent with itself or its manifest, otherwise None.

    The index has as many records as the manifest says. `samples` are the images of each shard by the manifest, `sizes`
    the bytes of each shard; labels must be 0..classes-1. Digests do not replace the check: they only show that the
    index is the one that was written, not that its writer was correct.
    """
    return _of_images(index.images, samples, sizes) or _of_annotations(index.images, index.annotations, classes)


def _of_images(images: Records, samples: Sequence[int], sizes: Sequence[int]) -> str | None:
    expected = np.repeat(np.arange(len(samples)), samples)
    wrong = _first(images["shard"] != expected)
    if wrong is not None:
        return f"row {wrong} is in shard {images['shard'][wrong]}, expected {expected[wrong]} by the manifest's counts"
    size = np.asarray(sizes, np.int64)[expected]
    for prefix, least in (("", 1), ("text_", 0)):
        offset, length = images[f"{prefix}offset"], images[f"{prefix}length"].astype(np.int64)
        # A difference of numbers known to be small, because `offset + length` may overflow in a damaged index.
        wrong = _first((offset < 0) | (length < least) | (length > size - np.minimum(offset, size)))
        if wrong is not None:
            return f"row {wrong} has {length[wrong]} bytes at {offset[wrong]} of a shard of {size[wrong]}"
    wrong = _first(np.minimum(images["width"], images["height"]) < 1)
    if wrong is not None:
        return f"row {wrong} is {images['width'][wrong]} x {images['height'][wrong]} pixels"
    return None if len(np.unique(images["image_id"])) == len(images) else "image ids are not distinct"


def _of_annotations(images: Records, annotations: Records, classes: int) -> str | None:
    count = images["count"].astype(np.int64)
    wrong = _first((count < 0) | (images["first"] != np.cumsum(count) - count))
    if wrong is not None:
        return f"row {wrong} has {count[wrong]} annotations from {images['first'][wrong]} on, not behind the row before"
    if count.sum() != len(annotations):
        return f"the images have {count.sum()} annotations, but there are {len(annotations)}"
    wrong = _first(annotations["image"] != np.repeat(np.arange(len(images)), count))
    if wrong is not None:
        return f"annotation {wrong} is of row {annotations['image'][wrong]}, but lies among those of another"
    wrong = _first((annotations["label"] < 0) | (annotations["label"] >= classes))
    if wrong is not None:
        return f"annotation {wrong} has label {annotations['label'][wrong]}, expected 0..{classes - 1}"
    return None


def _first(where: npt.NDArray[np.bool_]) -> int | None:
    """Return the position of the first true value, or None."""
    return int(where.argmax()) if where.any() else None


def npy(records: Records) -> bytes:
    """Return the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    return buffer.getvalue()
