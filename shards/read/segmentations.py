"""Segmentations: read from the shards, checked, and converted to masks and run-length encodings.

COCO has segmentations as polygons, as run lengths, or as run lengths compressed into a string. All are converted to
pycocotools' *runs*, `{"size": [height, width], "counts": bytes}`, which are small and which scoring takes. The index
holds offset, length and checksum of the segmentations of each sample.

pycocotools reads out of bounds if run lengths do not fill the image, so they are checked first.
"""

import math
from contextlib import closing

import msgspec
import numpy as np

from shards.arrays import Ints
from shards.dataset.manifest import Manifest
from shards.errors import BadSampleError
from shards.masks.parse import FormError
from shards.masks.rle import Masks, Runs, decode_masks, to_runs
from shards.read.member_reader import MemberReader
from shards.read.segments import SegmentReader

CHECKED_IMAGES = 32  # checked in each data set before a run
_segmentations = msgspec.json.Decoder(list[msgspec.Raw])
_ABSENT = msgspec.Raw(b"null")


class SegmentationReader:
    """Decoder of the segmentations of single samples into runs or masks; safe to share between threads."""

    def __init__(self, manifest: Manifest, members: MemberReader) -> None:
        self._index = manifest.index()
        self._members = members

    def runs(self, row: int, text: bytes, *, crowds: bool) -> list[Runs]:
        """Return the runs of a sample's annotations in the order of the index, with or without those of crowds.

        text: the sample's segmentations from `MemberReader`, empty if it has none.

        Raise `BadSampleError`, naming image and annotation, if a segmentation is absent or cannot be used.
        """
        image = self._index.images[row]
        annotations = self._index.annotations_of(row)
        height, width = int(image["height"]), int(image["width"])
        runs = []
        for annotation, raw in zip(annotations, self._parse(row, text), strict=True):
            if annotation["iscrowd"] and not crowds:
                continue
            try:
                runs.append(to_runs(raw, height, width))
            except FormError as error:
                raise BadSampleError(
                    f"{self._members.name(row)}: annotation {int(annotation['annotation_id'])} {error}; masks need polygons "
                    "or run lengths of every object: correct it and write the data set again, or train without masks"
                ) from None
        return runs

    def masks(self, row: int, text: bytes) -> Masks:
        """Return the masks of a sample's non-crowd annotations, bool [N, height, width]; raise as `runs`."""
        image = self._index.images[row]
        return decode_masks(self.runs(row, text, crowds=False), int(image["height"]), int(image["width"]))

    def _parse(self, row: int, text: bytes) -> list[msgspec.Raw]:
        """Return the JSON of each annotation's segmentation, crowds included, in the order of the index."""
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


def open_segmentations(manifest: Manifest, members: MemberReader) -> SegmentationReader | SegmentReader:
    """Return the decoder of the segmentations of a data set's kind."""
    return SegmentReader(manifest, members) if manifest.panoptic else SegmentationReader(manifest, members)


def true_runs(manifest: Manifest, rows: Ints, *, cached: bool = True) -> list[Runs]:
    """Return the runs of all annotations of `rows`, crowds included, in the order of the rows and of the index.

    cached: read through the data set's cache, which fetches complete shards.
    """
    with closing(MemberReader(manifest, cached=cached)) as members:
        reader = open_segmentations(manifest, members)
        return [runs for row in rows.tolist() for runs in reader.runs(row, members.segmentations(row), crowds=True)]


def check_segmentations(manifest: Manifest, most: int = 0) -> None:
    """Check the segmentations of up to `CHECKED_IMAGES` images, evenly spread over those that have annotations.

    A data set without segmentations is recognised within seconds. Raise `ShardError`, naming the first bad image, if
    more than `most` of the checked images are bad, or all of them.
    """
    rows = np.flatnonzero(manifest.index().images["count"] > 0)
    stride = max(1, math.ceil(len(rows) / CHECKED_IMAGES))
    checked = rows[::stride].tolist()
    errors: list[BadSampleError] = []
    with closing(MemberReader(manifest, cached=False)) as members:
        reader = open_segmentations(manifest, members)
        for row in checked:
            try:
                reader.runs(row, members.segmentations(row), crowds=True)
            except BadSampleError as error:
                errors.append(error)
                if len(errors) > most:
                    raise errors[0] from None
    if errors and len(errors) == len(checked):
        raise errors[0]
