"""Make the records of the index from the source and the written shards."""

from collections.abc import Sequence

import numpy as np

from shards.arrays import Ints, Records
from shards.dataset.index import ANNOTATION_DTYPE, IMAGE_DTYPE
from shards.source.coco import Source
from shards.source.columns import positions
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
    records["count"] = source.count[rows]
    records["first"] = np.cumsum(records["count"]) - records["count"]
    return records, rows


def annotation_records(source: Source, rows: Ints) -> Records:
    """Return ANNOTATION_DTYPE [annotations] of the source's images `rows`, in their order."""
    count = source.count[rows]
    starts = np.cumsum(count) - count
    within = np.arange(count.sum()) - np.repeat(starts, count)
    picked = source.rows[np.repeat(source.first[rows], count) + within]
    columns = source.annotations
    records = np.zeros(len(picked), ANNOTATION_DTYPE)
    records["annotation_id"] = columns.ids[picked]
    records["image"] = np.repeat(np.arange(len(rows)), count)
    records["bbox"] = columns.boxes[picked]
    records["area"] = columns.areas[picked]
    category_ids = np.array([category.id for category in source.categories], np.int64)
    records["label"] = positions(columns.category_ids[picked], category_ids)
    records["iscrowd"] = columns.iscrowd[picked]
    return records
