"""Read COCO's panoptic JSON, and the lists of its images and PNGs, into the columns of a source: a row per segment.

Images and annotations are paired by id. The pixels are checked when shards are written, see `shards.source.segments`.
"""

import hashlib
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from shards.arrays import Ints
from shards.errors import ShardError
from shards.source.checks import check_images
from shards.source.coco import CategoryFields, SegmentFolder, Source, by_image, lowest_ids, read_categories
from shards.source.columns import AnnotationColumns, Int64, Texts, id_in, image_columns
from shards.source.defects import Defect, SourceError
from shards.source.folder import file_finder, require
from shards.source.json_file import INSTANCES, PANOPTIC, open_json, read_top, refuse_deep_nesting, without_entries
from shards.source.panoptic_checks import check_segments, pair_images
from shards.store import storage

_Level = Annotated[int, msgspec.Meta(ge=0, le=255)]
_NO_BOX = (np.nan,) * 4  # of a segment whose JSON gives none: nothing to compare with its pixels


class _PanopticCategory(CategoryFields):
    isthing: Literal[0, 1] | bool
    color: tuple[_Level, _Level, _Level] | None = None

    def __post_init__(self) -> None:
        self.isthing = bool(self.isthing)


class _Annotation(msgspec.Struct, gc=False):
    image_id: Int64
    file_name: str
    segments_info: list[msgspec.Raw]


class _Segment(msgspec.Struct, gc=False):
    id: Int64
    category_id: Int64
    area: float
    iscrowd: Int64 = 0
    bbox: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, eq=False)
class _Annotations:
    """The JSON's well-formed annotations, each of an image, and the segments of all.

    `malformed` are the ids of images with a malformed annotation, `lost` the image's id of each malformed segment.
    """

    image_ids: Ints
    names: list[str]
    segments: AnnotationColumns
    malformed: set[int]
    lost: Ints


def read_panoptic_source(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    segments: str | os.PathLike[str],
    limit: int = 0,
) -> Source:
    """Read and check a panoptic JSON and the lists of its folders of images and PNGs (not yet the files' content).

    Both folders may be URLs. `limit`: take only this many images, those with the lowest ids; 0 takes all. Errors are
    those of `read_source`.
    """
    path = Path(annotations)
    folders, kinds = [], ("folder of images", "folder of segments")
    for given, kind in zip((images, segments), kinds, strict=True):
        folder = storage.absolute(os.fspath(given))
        local = storage.local_path(folder)
        if local is not None:
            require(local, kind)
        folders.append(folder)
    content = open_json(path, PANOPTIC)
    has_image, has_png = map(file_finder, folders, kinds)
    with refuse_deep_nesting(path, PANOPTIC):
        return _parse(path, content, folders[0], has_image, folders[1], has_png, limit)


def _parse(
    path: Path,
    content: mmap.mmap,
    folder: str,
    has_image: Callable[[str], bool],
    png_folder: str,
    has_png: Callable[[str], bool],
    limit: int,
) -> Source:
    top, lists = read_top(path, content, PANOPTIC)
    first = b"".join(lists["annotations"][:1])
    if b'"bbox"' in first and b'"segments_info"' not in first:
        raise ShardError(f"{path}: is in {INSTANCES}; expected {PANOPTIC}: use `detr shard coco`")
    categories = read_categories(path, lists["categories"], _PanopticCategory)
    if not lists["images"]:
        raise SourceError(path, [Defect("it lists no images; expected some")])
    defects: list[Defect] = []
    images = image_columns(lists["images"], defects)
    malformed = {defect.image_id for defect in defects if defect.image_id is not None}
    annotations = _annotations(lists["annotations"], defects)
    limited = 0 < limit < len(images)
    images, defects, last = lowest_ids(images, limit, defects)
    selected = annotations.segments.image_ids <= last
    listed_images = len(images) if limited else len(lists["images"])
    known = np.array([*images.ids.tolist(), *malformed], np.int64)
    rows, found = check_images(images, has_image)
    paired, names, more = pair_images(
        images.take(rows), annotations.image_ids, annotations.names, annotations.malformed, known, last, has_png
    )
    images = images.take(rows).take(paired)
    segment_rows, owners, most = check_segments(annotations.segments, selected, images, categories)
    if len(images) and not len(segment_rows) and not limited:
        nothing = Defect("it lists no segment that can be used; expected some: is it the JSON of these images?")
        raise SourceError(path, [nothing, *(defect for defect in (*defects, *found, *more, *most) if defect.rejected)])
    segment_rows, first_segments, count = by_image(segment_rows, owners, len(images))
    digest = hashlib.sha256(content).hexdigest()
    return Source(
        path=path,
        folder=folder,
        digest=digest,
        json_digest=digest,
        categories=categories,
        images=images,
        annotations=annotations.segments,
        rows=segment_rows,
        first=first_segments,
        count=count,
        rest=without_entries(top),
        listed=(listed_images, int(selected.sum() + (annotations.lost <= last).sum())),
        defects=(*defects, *found, *more, *most),
        limited=limited,
        segments=SegmentFolder(png_folder, names),
    )


def _annotations(raws: Texts, defects: list[Defect]) -> _Annotations:
    """Return the annotations and their segments; append a defect for each malformed entry, which is left out."""
    decode, decode_segment = msgspec.json.Decoder(_Annotation).decode, msgspec.json.Decoder(_Segment).decode
    image_ids, names = list[int](), list[str]()
    malformed, lost = set[int](), list[int]()
    texts, segments, owners = Texts(), list[_Segment](), list[int]()
    for number, raw in enumerate(raws):
        try:
            annotation = decode(raw)
        except msgspec.ValidationError as error:
            image_id = id_in(raw, "image_id")
            owner = "" if image_id is None else f" (of image {image_id})"
            malformed |= set() if image_id is None else {image_id}
            defects.append(Defect(f"annotations[{number}]{owner}: {_plain(error)}", image_id=image_id))
            continue
        image_ids.append(annotation.image_id)
        names.append(annotation.file_name)
        for position, text in enumerate(annotation.segments_info):
            try:
                segment = decode_segment(text)
            except msgspec.ValidationError as error:
                segment_id = id_in(text, "id")
                name = f"segments_info[{position}]" if segment_id is None else f"segment {segment_id}"
                message = f"{name} of image {annotation.image_id}: {_plain(error)}"
                defects.append(Defect(message, "malformed", annotation.image_id, segment_id))
                lost.append(annotation.image_id)
                continue
            texts.append(text)
            segments.append(segment)
            owners.append(annotation.image_id)
    columns = _columns(segments, owners, texts)
    return _Annotations(np.array(image_ids, np.int64), names, columns, malformed, np.array(lost, np.int64))


def _columns(segments: list[_Segment], owners: list[int], texts: Texts) -> AnnotationColumns:
    return AnnotationColumns(
        ids=np.array([segment.id for segment in segments], np.int64),
        image_ids=np.array(owners, np.int64),
        category_ids=np.array([segment.category_id for segment in segments], np.int64),
        boxes=np.array([segment.bbox or _NO_BOX for segment in segments], np.float64).reshape(-1, 4),
        areas=np.array([segment.area for segment in segments], np.float64),
        iscrowd=np.array([segment.iscrowd for segment in segments], np.int64),
        texts=texts,
    )


def _plain(error: Exception) -> str:
    return str(error).replace("`", "")
