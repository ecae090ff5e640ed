"""Segmentations: read from the shards, checked, and converted to masks and run-length encodings.

COCO has segmentations as polygons, as run lengths, or as run lengths compressed into a string. All are converted to
pycocotools' *runs*, `{"size": [height, width], "counts": bytes}`, which are small and which scoring takes. The index
holds offset, length and checksum of the segmentations of each sample.

pycocotools reads out of bounds if run lengths do not fill the image, so they are checked first.
"""

import math
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
CHECKED_IMAGES = 32  # checked in each data set before a run

_segmentations = msgspec.json.Decoder(list[msgspec.Raw])
_ABSENT = msgspec.Raw(b"null")


class SegmentationReader:
    """Decoder of the segmentations of single samples into runs or masks; safe to share between threads."""

    def __init__(self, manifest: Manifest, members: Members) -> None:
        self._index = manifest.index()
        self._members = members

    def runs(self, row: int, text: bytes, *, crowds: bool) -> list[Runs]:
        """Return the runs of a sample's annotations in the order of the index, with or without those of crowds.

        text: the sample's segmentations from `Members`, empty if it has none.

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
                runs.append(_to_runs(raw, height, width))
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


def true_runs(manifest: Manifest, rows: Ints, *, cached: bool = True) -> list[Runs]:
    """Return the runs of all annotations of `rows`, crowds included, in the order of the rows and of the index.

    cached: read through the data set's cache, which fetches complete shards.
    """
    with closing(Members(manifest, cached=cached)) as members:
        reader = SegmentationReader(manifest, members)
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
    with closing(Members(manifest, cached=False)) as members:
        reader = SegmentationReader(manifest, members)
        for row in checked:
            try:
                reader.runs(row, members.segmentations(row), crowds=True)
            except BadSampleError as error:
                errors.append(error)
                if len(errors) > most:
                    raise errors[0] from None
    if errors and len(errors) == len(checked):
        raise errors[0]


def encode_masks(masks: Masks) -> npt.NDArray[np.object_]:
    """Return the counts of the masks' runs, bytes [N], as `Detections.masks` holds them.

    masks: bool [N, height, width] in any memory layout; [N, width, height] transposed avoids a copy.
    """
    from pycocotools import mask

    counts = np.empty(len(masks), np.object_)
    if len(masks):
        columns = np.asfortranarray(masks.transpose(1, 2, 0)).view(np.uint8)
        counts[:] = [runs["counts"] for runs in mask.encode(columns)]
    return counts


def decode_masks(runs: Sequence[Runs], height: int, width: int) -> Masks:
    """Return the masks of `runs` of images of that size, bool [N, height, width]."""
    from pycocotools import mask

    masks = np.zeros((len(runs), height, width), np.bool_)
    if runs:
        columns = mask.decode(list(runs)).view(np.bool_)
        boxes = mask.toBbox(list(runs)).astype(int).tolist()
        # Only the boxes, because copying from column-major to row-major order is slow.
        for number, (x, y, box_width, box_height) in enumerate(boxes):
            region = np.s_[y : y + box_height, x : x + box_width]
            masks[number][region] = columns[..., number][region]
    return masks


def _to_runs(raw: msgspec.Raw, height: int, width: int) -> Runs:
    """Return the runs of a segmentation given as JSON; raise `FormError` if it cannot be used."""
    from pycocotools import mask

    shape = outlines(raw, height, width)
    if isinstance(shape[0], int):
        runs: Runs = mask.frPyObjects({"size": [height, width], "counts": shape}, height, width)
        return runs
    merged: Runs = mask.merge(mask.frPyObjects(shape, height, width))
    return merged
