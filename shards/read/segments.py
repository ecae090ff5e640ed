"""Segments of a panoptic data set: its PNGs read from the shards, checked against the index, and made into masks.

Everything but the pixels is in the index, also the boxes, so boxes alone are read without a PNG.
"""

import numpy as np

from shards.arrays import Records
from shards.dataset.manifest import Manifest
from shards.errors import BadSampleError
from shards.masks.rle import Masks, Runs, encode_masks
from shards.panoptic.segment_png import SegmentPngError, read_ids
from shards.panoptic.segments import TrueSegments, segment_masks
from shards.read.member_reader import MemberReader


class SegmentReader:
    """Decoder of the PNGs of single samples; safe to share between threads.

    content: the sample's PNG from `MemberReader.segmentations`. Every method raises `BadSampleError`, naming the image,
    if it cannot be used.
    """

    def __init__(self, manifest: Manifest, members: MemberReader) -> None:
        self._index = manifest.index()
        self._members = members

    def segments(self, row: int, content: bytes) -> TrueSegments:
        """Return the true segments of a sample, crowds included, in the order of the index."""
        image = self._index.images[row]
        annotations = self._index.annotations_of(row)
        try:
            ids = read_ids(content)
        except SegmentPngError as error:
            raise BadSampleError(f"{self._members.name(row)}: its PNG {error}") from None
        expected = int(image["height"]), int(image["width"])
        if ids.shape != expected:
            raise BadSampleError(
                f"{self._members.name(row)}: its PNG has {ids.shape[0]} rows and {ids.shape[1]} columns, expected "
                f"{expected[0]} and {expected[1]}: write the data set again"
            )
        return TrueSegments(
            ids=ids,
            segment_ids=annotations["annotation_id"].astype(np.uint32),
            labels=annotations["label"].astype(np.int64),
            areas=annotations["area"].astype(np.float64),
            crowds=annotations["iscrowd"] != 0,
        )

    def masks(self, row: int, content: bytes) -> Masks:
        """Return the masks of a sample's segments, bool [N, height, width], crowds included."""
        segments = self.segments(row, content)
        return segment_masks(segments.ids, segments.segment_ids)

    def runs(self, row: int, content: bytes, *, crowds: bool) -> list[Runs]:
        """Return the runs of a sample's segments in the order of the index, with or without those of crowds."""
        segments = self.segments(row, content)
        wanted = segments.segment_ids if crowds else segments.segment_ids[~segments.crowds]
        size = list(segments.ids.shape)
        return [{"size": size, "counts": counts} for counts in encode_masks(segment_masks(segments.ids, wanted))]


def corner_boxes(annotations: Records) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Return float32 [N, 4], xyxy: the last column and row of each segment are its far side, as in the original.

    A segment of one pixel has a box of no size.
    """
    boxes = annotations["bbox"]
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - 1], axis=1).astype(np.float32)
