"""Segments of an image: the truth for scoring, and areas, boxes and masks from the ids of its pixels."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shards.arrays import Floats, Ints, Mask
from shards.panoptic.segment_png import SegmentIds


@dataclass(frozen=True, eq=False)
class TrueSegments:
    """The true segments of one image.

    ids: uint32 [height, width], the segment of each pixel; 0 is VOID. An id that is not in `segment_ids` is neither.
    segment_ids: uint32 [N], in the order of the JSON and of the index.
    labels: int64 [N], labels of the manifest.
    areas: float64 [N], pixels by the JSON, which scoring takes in place of counting.
    crowds: bool [N].
    """

    ids: SegmentIds
    segment_ids: npt.NDArray[np.uint32]
    labels: Ints
    areas: Floats
    crowds: Mask


@dataclass(frozen=True, eq=False)
class Regions:
    """Contents of an array of segment ids, VOID included.

    ids: uint32 [N], ascending. areas: int64 [N], pixels.
    corners: int64 [N, 4], first column and row, last column and row, both inside.
    """

    ids: npt.NDArray[np.uint32]
    areas: Ints
    corners: Ints


def find_regions(ids: SegmentIds) -> Regions:
    """Return the regions of uint32 [height, width] with their areas and corners.

    Pixels are joined into runs of a row first: a picture has a hundred times fewer runs than pixels.
    """
    height, width = ids.shape
    begins = np.ones((height, width), np.bool_)
    np.not_equal(ids[:, 1:], ids[:, :-1], out=begins[:, 1:])
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=height * width)
    of_run = ids.reshape(-1)[starts]
    order = np.argsort(of_run, kind="stable")
    found, first = np.unique(of_run[order], return_index=True)
    rows, columns = np.divmod(starts[order], width)
    lengths = lengths[order]
    corners = (
        np.minimum.reduceat(columns, first),
        np.minimum.reduceat(rows, first),
        np.maximum.reduceat(columns + lengths - 1, first),
        np.maximum.reduceat(rows, first),
    )
    return Regions(found, np.add.reduceat(lengths, first), np.stack(corners, axis=1))


def segment_masks(ids: SegmentIds, segment_ids: npt.NDArray[np.uint32]) -> Mask:
    """Return the pixels of each segment, bool [N, height, width]."""
    masks: Mask = ids[None] == segment_ids[:, None, None]
    return masks
