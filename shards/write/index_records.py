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
    shards = [part for part in written if part.shard is not None]
    places = [place for part in shards for place in part.places]
    records = np.zeros(len(places), IMAGE_DTYPE)
    for field in places[0].__struct_fields__ if places else ():
        records[field] = [getattr(place, field) for place in places]
    records["shard"] = np.repeat(np.arange(len(shards)), [len(part.places) for part in shards])
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
