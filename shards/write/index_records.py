"""Make the records of the index from the source and the written shards."""

from collections.abc import Sequence

import numpy as np

from shards.arrays import Ints, Records
from shards.dataset.index import ANNOTATION_DTYPE, IMAGE_DTYPE
from shards.source.coco import Source
from shards.source.columns import positions
from shards.source.segments import MeasuredSegment
from shards.write.shard import ShardResult


def image_records(source: Source, written: Sequence[ShardResult]) -> tuple[Records, Ints]:
    """Return IMAGE_DTYPE [written images], in the order of the shards, and the row of each in the source."""
    shards = [result for result in written if result.shard is not None]
    members = [member for result in shards for member in result.members]
    records = np.zeros(len(members), IMAGE_DTYPE)
    for field in members[0].__struct_fields__ if members else ():
        records[field] = [getattr(member, field) for member in members]
    records["shard"] = np.repeat(np.arange(len(shards)), [len(result.members) for result in shards])
    rows = positions(records["image_id"], source.images.ids)
    records["width"], records["height"] = source.images.widths[rows], source.images.heights[rows]
    records["count"] = source.count[rows] if source.segments is None else list(map(len, _segments(written)))
    records["first"] = np.cumsum(records["count"]) - records["count"]
    return records, rows


def annotation_records(source: Source, rows: Ints, written: Sequence[ShardResult]) -> Records:
    """Return ANNOTATION_DTYPE [annotations] of the written images, `rows` of the source, in their order."""
    if source.segments is None:
        count = source.count[rows]
        starts = np.cumsum(count) - count
        within = np.arange(count.sum()) - np.repeat(starts, count)
    else:
        measured = [segment for segments in _segments(written) for segment in segments]
        count = np.array([len(segments) for segments in _segments(written)], np.int64)
        within = np.array([segment.position for segment in measured], np.int64)
    picked = source.rows[np.repeat(source.first[rows], count) + within]
    columns = source.annotations
    records = np.zeros(len(picked), ANNOTATION_DTYPE)
    records["annotation_id"] = columns.ids[picked]
    records["image"] = np.repeat(np.arange(len(rows)), count)
    if source.segments is None:
        records["bbox"] = columns.boxes[picked]
    else:
        records["bbox"] = np.array([segment.box for segment in measured], np.float64).reshape(-1, 4)
    records["area"] = columns.areas[picked]
    category_ids = np.array([category.id for category in source.categories], np.int64)
    records["label"] = positions(columns.category_ids[picked], category_ids)
    records["iscrowd"] = columns.iscrowd[picked]
    return records


def _segments(written: Sequence[ShardResult]) -> list[tuple[MeasuredSegment, ...]]:
    """Return the segments of each written image of a panoptic source."""
    return [segments for result in written if result.shard is not None for segments in result.segments]
