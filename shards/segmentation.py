"""Where objects are, pixel by pixel: segmentations found in the shards, checked, and turned into masks.

COCO writes a segmentation as polygons, as run lengths, or as run lengths squeezed into a string. All become pycocotools'
*runs*, ``{"size": [height, width], "counts": bytes}``, which are small and are what scoring takes. The index says where
those of a sample lie, and their checksum.

pycocotools reads memory that is not its own when run lengths do not fill the image, so they are checked first.
"""

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shards.errors import BadSampleError
from shards.index import Ints
from shards.manifest import Manifest
from shards.members import Members
from shards.outlines import FormError, outlines

Masks = npt.NDArray[np.bool_]
Runs = dict[str, Any]
CHECKED_IMAGES = 32  # of each data set before a run

_segmentations = msgspec.json.Decoder(list[msgspec.Raw])
_ABSENT = msgspec.Raw(b"null")


class SegmentationReader:
    """Turns the segmentations of single samples into runs and masks; safe to share between threads."""

    def __init__(self, manifest: Manifest, members: Members) -> None:
        self._index = manifest.index()
        self._members = members

    def runs(self, row: int, text: bytes, *, crowds: bool) -> list[Runs]:
        """Runs of a sample's annotations in the order of the index, with or without those of crowds.

        text: what ``Members`` gives for the sample.

        Raises BadSampleError naming the image, and the annotation where one has no segmentation that can be used.
        """
        image = self._index.images[row]
        annotations = self._index.annotations_of(row)
        size = int(image["height"]), int(image["width"])
        found = []
        for annotation, raw in zip(annotations, self._parse(row, text), strict=True):
            if crowds or not annotation["iscrowd"]:
                try:
                    found.append(_to_runs(raw, *size))
                except FormError as error:
                    raise BadSampleError(
                        f"{self._members.name(row)}: annotation {int(annotation['annotation_id'])} {error}; masks need polygons "
                        "or run lengths of every object: correct it and write the data set again, or go without masks"
                    ) from None
        return found

    def masks(self, row: int, text: bytes) -> Masks:
        """bool [N, height, width] of a sample's non-crowd annotations."""
        image = self._index.images[row]
        return decode_masks(self.runs(row, text, crowds=False), int(image["height"]), int(image["width"]))

    def _parse(self, row: int, text: bytes) -> list[msgspec.Raw]:
        """The JSON of each annotation's segmentation, crowds included, in the order of the index."""
        count = int(self._index.images[row]["count"])
        if not text:
            return [_ABSENT] * count
        try:
            segmentations = _segmentations.decode(text)
            if len(segmentations) != count:
                raise ValueError(f"there are {len(segmentations)} for {count} annotations")
        except (ValueError, msgspec.DecodeError) as error:
            raise BadSampleError(
                f"{self._members.name(row)}: its segmentations cannot be read ({error}); expected a list with one for each "
                "annotation: write the data set again"
            ) from None
        return segmentations


def true_runs(manifest: Manifest, rows: Ints, *, cached: bool = True) -> list[Runs]:
    """Runs of every annotation of ``rows``, crowds included, in the order of the rows and of the index.

    cached: read through the data set's cache, which fetches whole shards.
    """
    with closing(Members(manifest, cached=cached)) as members:
        reader = SegmentationReader(manifest, members)
        return [runs for row in rows.tolist() for runs in reader.runs(row, members.segmentations(row), crowds=True)]


def check_segmentations(manifest: Manifest, most: int = 0) -> None:
    """Look at the segmentations of some images, evenly spread over those that have annotations.

    Finds in moments a data set that was made without them. Raises ShardError naming the first image that has none that
    can be used where there are more than ``most`` such images, or no others.
    """
    rows = np.flatnonzero(manifest.index().images["count"] > 0)
    looked = rows[:: max(1, -(-len(rows) // CHECKED_IMAGES))].tolist()
    bad: list[BadSampleError] = []
    with closing(Members(manifest, cached=False)) as members:
        reader = SegmentationReader(manifest, members)
        for row in looked:
            try:
                reader.runs(row, members.segmentations(row), crowds=True)
            except BadSampleError as error:
                bad.append(error)
                if len(bad) > most:
                    raise bad[0] from None
    if bad and len(bad) == len(looked):
        raise bad[0]


def encode_masks(masks: Masks) -> npt.NDArray[np.object_]:
    """The counts of masks' runs, bytes [N]: what ``Detections.masks`` holds.

    masks: bool [N, height, width] in any memory layout; one whose columns are contiguous ([N, width, height]
    transposed) spares a copy.
    """
    from pycocotools import mask

    counts = np.empty(len(masks), np.object_)
    if len(masks):
        columns = np.asfortranarray(masks.transpose(1, 2, 0)).view(np.uint8)
        counts[:] = [runs["counts"] for runs in mask.encode(columns)]
    return counts


def decode_masks(runs: Sequence[Runs], height: int, width: int) -> Masks:
    """bool [N, height, width] of runs of that size."""
    from pycocotools import mask

    masks = np.zeros((len(runs), height, width), np.bool_)
    if runs:
        columns = mask.decode(list(runs)).view(np.bool_)  # column by column, so copying all of it to rows is slow
        for number, (x, y, across, down) in enumerate(mask.toBbox(list(runs)).astype(int).tolist()):
            masks[number, y : y + down, x : x + across] = columns[y : y + down, x : x + across, number]
    return masks


def _to_runs(raw: msgspec.Raw, height: int, width: int) -> Runs:
    """Raises FormError saying what is wrong with the segmentation."""
    from pycocotools import mask

    found = outlines(raw, height, width)
    if isinstance(found[0], int):
        runs: Runs = mask.frPyObjects({"size": [height, width], "counts": found}, height, width)
        return runs
    merged: Runs = mask.merge(mask.frPyObjects(found, height, width))
    return merged
