"""Read a COCO JSON and the list of its image folder into columns, and collect every defect."""

import errno
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np

from shards.arrays import Ints
from shards.dataset.categories import Category
from shards.errors import ShardError
from shards.source.checks import check_annotations, check_images
from shards.source.columns import AnnotationColumns, ImageColumns, Texts, annotation_columns, image_columns
from shards.source.corrections import Corrections, corrected
from shards.source.defects import Defect, SourceError
from shards.source.images import ImageSource
from shards.store import storage

# The entries of lists stay undecoded text, so that one pass over the file finds all of them.
_Top = dict[str, list[msgspec.Raw] | dict[str, msgspec.Raw] | str | int | float | bool | None]


class _CategoryFields(msgspec.Struct):
    id: Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
    name: str


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
        _require(local, "folder of images")
    _require(path, "COCO JSON file")
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise ShardError(f"{path}: is empty; expected COCO's instances format")
        # Mapped and not read: this saves a copy of half a gigabyte, and the system can reclaim the memory.
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return parse_source(path, content, folder, _file_finder(folder), limit, corrections)
    except RecursionError:
        raise ShardError(f"{path}: brackets are nested too deeply; expected COCO's instances format") from None


def parse_source(
    path: Path,
    content: bytes | mmap.mmap,
    folder: str,
    has_file: Callable[[str], bool],
    limit: int = 0,
    corrections: Corrections | None = None,
) -> Source:
    """Parse a JSON's content as `read_source` does; `has_file` tells if the folder has a file of that name."""
    top = _top_level(path, content)
    lists = {key: _list(path, key, top[key]) for key in ("images", "annotations", "categories")}
    categories = _categories(path, lists["categories"])
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
    selected = np.ones(len(annotations), np.bool_)
    limited = 0 < limit < len(listed)
    if limited:
        last = int(np.partition(listed.ids, limit - 1)[limit - 1])
        listed = listed.take(np.flatnonzero(listed.ids <= last))
        defects = [defect for defect in defects if defect.image_id is None or defect.image_id <= last]
        selected = annotations.image_ids <= last
        counts = len(listed), int(selected.sum())
    rows, found = check_images(listed, has_file)
    images = listed.take(rows)
    known = np.concatenate([listed.ids, malformed])
    rows, owners, more = check_annotations(annotations, selected, images, known, category_ids)
    count = np.bincount(owners, minlength=len(images)).astype(np.int64)
    return Source(
        path=path,
        folder=folder,
        digest=digest,
        json_digest=json_digest,
        categories=categories,
        images=images,
        annotations=annotations,
        rows=rows[np.argsort(owners, kind="stable")],
        first=np.cumsum(count) - count,
        count=count,
        rest=without_entries(top),
        listed=counts,
        defects=(*defects, *found, *more),
        limited=limited,
        corrections=corrections,
    )


def without_entries(top: Mapping[str, Any]) -> bytes:
    """Return the compact JSON of a COCO file's top level without images and annotations."""
    rest = {key: value for key, value in top.items() if key not in ("images", "annotations")}
    return msgspec.json.format(msgspec.json.encode(rest), indent=-1)


def file_sizes(folder: str, names: Iterable[str]) -> dict[str, int]:
    """Return the size in bytes of each of `names` in a folder or below a URL; names that are not files are left out."""
    local = storage.local_path(folder)
    if local is None:
        sizes = storage.listing(folder)
        return {name: sizes[name] for name in names if name in sizes}
    found = {}
    for name in names:
        try:
            found[name] = (local / name).stat().st_size
        except OSError:
            continue
    return found


def _file_finder(folder: str) -> Callable[[str], bool]:
    """Return a function that tells if the folder has a file, from one listing instead of a request per image."""
    local = storage.local_path(folder)
    if local is None:
        remote = storage.listing(folder)
        if not remote:
            raise ShardError(f"{folder}: holds no files; expected a folder of images: check it for a typo")
        return remote.__contains__
    present = set(os.listdir(local))
    return lambda name: name in present or _is_file(local / name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # no file can have such a name
            return False
        raise


def _require(path: Path, kind: str) -> None:
    if not path.exists():
        raise ShardError(f"{path}: no such {kind}; expected the path of an existing one: check it for a typo")
    if path.is_dir() != kind.startswith("folder"):
        found = "folder" if path.is_dir() else "file"
        raise ShardError(f"{path}: is a {found}, expected a {kind}: check that --images and --annotations are right")


def _top_level(path: Path, content: bytes | mmap.mmap) -> dict[str, Any]:
    try:
        top = _decode_top(content)
    except msgspec.ValidationError:
        raise ShardError(f"{path}: not a JSON object; expected COCO's instances format") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        top = _lenient(path, content)
    missing = [key for key in ("images", "annotations", "categories") if key not in top]
    if missing:
        raise ShardError(
            f"{path}: not COCO's instances format: has no {' and no '.join(map(repr, missing))}; expected 'images', "
            "'annotations' and 'categories'"
        )
    return top


def _decode_top(content: bytes | mmap.mmap) -> dict[str, Any]:
    return msgspec.json.decode(content, type=_Top)


def _lenient(path: Path, content: bytes | mmap.mmap) -> dict[str, Any]:
    """Decode Python's NaN and Infinity, which JSON does not allow, as text, so that a defect names the entry."""
    try:
        return _decode_top(msgspec.json.encode(json.loads(bytes(content), parse_constant=str)))
    except msgspec.ValidationError:
        raise ShardError(f"{path}: not a JSON object; expected COCO's instances format") from None
    except ValueError as error:
        raise ShardError(f"{path}: not JSON ({error}); expected COCO's instances format") from None


def _list(path: Path, key: str, value: Any) -> Texts:
    if not isinstance(value, list):
        raise ShardError(f"{path}: its {key!r} are no list; expected COCO's instances format")
    return value


def _categories(path: Path, raws: Texts) -> tuple[Category, ...]:
    """Return the categories; raise `SourceError` for any defect, since labels would have no meaning."""
    defects: list[Defect] = []
    found: dict[int, Category] = {}
    for number, raw in enumerate(raws):
        try:
            fields = msgspec.json.decode(raw, type=_CategoryFields)
        except msgspec.ValidationError as error:
            defects.append(Defect(f"categories[{number}]: {str(error).replace('`', '')}"))
            continue
        if fields.id in found:
            defects.append(Defect(f"category id {fields.id} is given twice"))
        found[fields.id] = Category(fields.id, fields.name)
    if not defects and not found:
        defects.append(Defect("it lists no categories; expected some"))
    if defects:
        raise SourceError(path, defects)
    return tuple(found[number] for number in sorted(found))
