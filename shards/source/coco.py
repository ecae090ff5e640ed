"""Read a COCO JSON and the list of its image folder into columns, and collect every defect."""

import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from shards.arrays import Ints
from shards.dataset.categories import Category
from shards.errors import ShardError
from shards.source.checks import check_annotations, check_images
from shards.source.columns import AnnotationColumns, ImageColumns, Texts, annotation_columns, image_columns
from shards.source.corrections import Corrections, corrected
from shards.source.defects import Defect, SourceError
from shards.source.folder import file_finder, require
from shards.source.images import ImageSource
from shards.source.json_file import INSTANCES, PANOPTIC, open_json, read_top, refuse_deep_nesting, without_entries
from shards.store import storage


class CategoryFields(msgspec.Struct):
    """A category in the JSON; the fields are those of `Category`."""

    id: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    name: str


@dataclass(frozen=True, eq=False)
class SegmentFolder:
    """PNGs of a panoptic source: their folder or URL, and the file name of each sound image's."""

    folder: str
    names: list[str]


@dataclass(frozen=True, eq=False)
class Source:
    """The sound entries of a COCO data set, and the defects of all."""

    path: Path
    """The JSON file."""
    folder: str
    """The image folder, a path or a URL."""
    digest: str
    """Sha256 of the JSON file; with corrections, that of both digests."""
    json_digest: str
    """Sha256 of the JSON file."""
    categories: tuple[Category, ...]
    """In ascending order of their ids."""
    images: ImageColumns
    """The sound images, in the order of the file."""
    annotations: AnnotationColumns
    """All annotations of the file, in its order."""
    rows: Ints
    """Int64 [sound annotations], rows of `annotations`: those of image r are at `first[r] : first[r] + count[r]`."""
    first: Ints
    """Int64 [images]."""
    count: Ints
    """Int64 [images]."""
    rest: bytes
    """The JSON without its images and annotations."""
    listed: tuple[int, int]
    """Number of images and of annotations in the file."""
    defects: tuple[Defect, ...]
    """Defects of the rejected entries, and notes on others."""
    limited: bool
    """True if there are more images than the limit."""
    corrections: Corrections | None = None
    """Corrections that are already in the columns."""
    segments: SegmentFolder | None = None
    """PNGs of segments in a panoptic source; its annotations are the segments."""

    def image(self, row: int) -> ImageSource:
        """Return the entry of an image."""
        images = self.images
        return ImageSource(int(images.ids[row]), images.names[row], int(images.widths[row]), int(images.heights[row]))


def read_source(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    limit: int = 0,
    corrections: Corrections | None = None,
) -> Source:
    """Read and check a COCO JSON and the list of its image folder (not yet the images' content).

    `images` is a folder or a URL. `limit`: take only this many images, those with the lowest ids; 0 takes all.
    `corrections` are applied to the annotations before they are checked.

    Raise `ShardError` when a path is missing or of the wrong kind or the file is not COCO's instances format, and
    `SourceError` when its categories are unusable. Defects of single entries are in `Source.defects`.
    """
    folder, path = storage.absolute(os.fspath(images)), Path(annotations)
    local = storage.local_path(folder)
    if local is not None:
        require(local, "folder of images")
    content = open_json(path, INSTANCES)
    with refuse_deep_nesting(path, INSTANCES):
        return parse_source(path, content, folder, file_finder(folder), limit, corrections)


def parse_source(
    path: Path,
    content: bytes | mmap.mmap,
    folder: str,
    has_file: Callable[[str], bool],
    limit: int = 0,
    corrections: Corrections | None = None,
) -> Source:
    """Parse a JSON's content as `read_source` does; `has_file` tells if the folder has a file of that name."""
    top, lists = read_top(path, content, INSTANCES)
    if b'"segments_info"' in b"".join(lists["annotations"][:1]):
        raise ShardError(f"{path}: is in {PANOPTIC}; expected {INSTANCES}: use `detr shard coco-panoptic`")
    categories = read_categories(path, lists["categories"], CategoryFields)
    if not lists["images"]:
        raise SourceError(path, [Defect("it lists no images; expected some")])
    category_ids = np.array([category.id for category in categories], np.int64)
    defects: list[Defect] = []
    listed = image_columns(lists["images"], defects)
    # Annotations of malformed images are dropped without a defect, like those of images that are rejected later.
    malformed = np.array([defect.image_id for defect in defects if defect.image_id is not None], np.int64)
    annotations = annotation_columns(lists["annotations"], defects)
    counts = len(lists["images"]), len(lists["annotations"])
    digest = json_digest = hashlib.sha256(content).hexdigest()
    if corrections is not None:
        before = len(annotations)
        annotations = corrected(corrections, annotations, listed.ids.tolist(), category_ids.tolist())
        counts = counts[0], counts[1] + len(annotations) - before
        digest = hashlib.sha256(f"{digest} {corrections.digest}".encode()).hexdigest()
    limited = 0 < limit < len(listed)
    listed, defects, last = lowest_ids(listed, limit, defects)
    selected = annotations.image_ids <= last
    if limited:
        counts = len(listed), int(selected.sum())
    rows, found = check_images(listed, has_file)
    images = listed.take(rows)
    known = np.concatenate([listed.ids, malformed])
    rows, owners, more = check_annotations(annotations, selected, images, known, category_ids)
    rows, first, count = by_image(rows, owners, len(images))
    return Source(
        path=path,
        folder=folder,
        digest=digest,
        json_digest=json_digest,
        categories=categories,
        images=images,
        annotations=annotations,
        rows=rows,
        first=first,
        count=count,
        rest=without_entries(top),
        listed=counts,
        defects=(*defects, *found, *more),
        limited=limited,
        corrections=corrections,
    )


def lowest_ids(images: ImageColumns, limit: int, defects: list[Defect]) -> tuple[ImageColumns, list[Defect], int]:
    """Return the `limit` images of the lowest ids, the defects of those and of no image, and the highest of the ids.

    A limit of 0 or of as many images as there are takes all of them; the highest id is then the largest integer.
    """
    if not 0 < limit < len(images):
        return images, defects, np.iinfo(np.int64).max
    last = int(np.partition(images.ids, limit - 1)[limit - 1])
    kept = [defect for defect in defects if defect.image_id is None or defect.image_id <= last]
    return images.take(np.flatnonzero(images.ids <= last)), kept, last


def by_image(rows: Ints, owners: Ints, images: int) -> tuple[Ints, Ints, Ints]:
    """Return `rows` in the order of the images that own them, and the first position and the number of each image's."""
    count = np.bincount(owners, minlength=images).astype(np.int64)
    return rows[np.argsort(owners, kind="stable")], np.cumsum(count) - count, count


def read_categories(path: Path, raws: Texts, fields: type[CategoryFields]) -> tuple[Category, ...]:
    """Return the categories; raise `SourceError` for any defect, since labels would have no meaning."""
    defects: list[Defect] = []
    found: dict[int, Category] = {}
    for number, raw in enumerate(raws):
        try:
            entry = msgspec.json.decode(raw, type=fields)
        except msgspec.ValidationError as error:
            defects.append(Defect(f"categories[{number}]: {str(error).replace('`', '')}"))
            continue
        if entry.id in found:
            defects.append(Defect(f"category id {entry.id} is given twice"))
        found[entry.id] = Category(**msgspec.structs.asdict(entry))
    if not defects and not found:
        defects.append(Defect("it lists no categories; expected some"))
    if defects:
        raise SourceError(path, defects)
    return tuple(found[number] for number in sorted(found))
