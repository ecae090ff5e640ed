"""A COCO JSON and its image folder, read into typed entries, with every defect found and named.

Entries keep their JSON text beside the typed fields, so that whatever else a file says about an image or an annotation
survives into the shards unchanged.
"""

import hashlib
import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import msgspec
from PIL import Image, UnidentifiedImageError

from shards.errors import ShardError
from shards.manifest import Category

# File extensions by Pillow's name of the format; MPO is what some cameras call a JPEG with a second picture inside.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif"}
NAMED_DEFECTS = 3

# What JSON cannot say but Python's writer does; kept as text until the check that names the annotation.
_Number = float | Literal["NaN", "Infinity", "-Infinity"]


class _ImageFields(msgspec.Struct, gc=False):
    id: int
    file_name: str
    width: int
    height: int


class _AnnotationFields(msgspec.Struct, gc=False):
    id: int
    image_id: int
    category_id: int
    bbox: tuple[_Number, _Number, _Number, _Number]
    area: _Number | None = None
    iscrowd: int = 0


class _CategoryFields(msgspec.Struct):
    id: int
    name: str


# Structs that the garbage collector skips: COCO parses in 5.0 s of CPU, against 7.7 s with frozen dataclasses.
class AnnotationEntry(msgspec.Struct, frozen=True, gc=False):
    """One annotation: the box is x, y, width, height in pixels as in the file; ``raw`` is its JSON."""

    id: int
    category_id: int
    bbox_xywh: tuple[float, float, float, float]
    area: float
    iscrowd: int
    raw: msgspec.Raw


class ImageEntry(msgspec.Struct, frozen=True, gc=False):
    """One image (size in pixels) with its annotations in the order of the file; ``raw`` is its JSON."""

    id: int
    file_name: str
    width: int
    height: int
    raw: msgspec.Raw
    annotations: list[AnnotationEntry] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """A sound COCO data set.

    Attributes:
        path: the JSON file.
        folder: the image folder.
        digest: sha256 of the JSON file.
        categories: in ascending order of their ids.
        images: in the order of the file.
        rest: the JSON without its images and annotations.
    """

    path: Path
    folder: Path
    digest: str
    categories: tuple[Category, ...]
    images: list[ImageEntry]
    rest: bytes


@dataclass(frozen=True)
class Defect:
    """One thing wrong with the source, in words that name the image or annotation."""

    text: str


class SourceError(ShardError):
    """The source is not sound. ``defects`` holds all of them; the message counts them and shows the first few."""

    def __init__(self, path: Path, defects: list[Defect]) -> None:
        shown = "; ".join(defect.text for defect in defects[:NAMED_DEFECTS])
        more = f"; and {len(defects) - NAMED_DEFECTS} more" if len(defects) > NAMED_DEFECTS else ""
        number = "1 defect" if len(defects) == 1 else f"{len(defects)} defects"
        super().__init__(f"{path}: {number}: {shown}{more}. Nothing was written: correct or remove them and run again")
        self.defects = tuple(defects)


def read_source(images: str | os.PathLike[str], annotations: str | os.PathLike[str]) -> Source:
    """Read and check a COCO JSON and the list of its image folder (not yet the images' content).

    Raises ShardError where a path is absent or of the wrong kind or the file is not COCO's instances format, and
    SourceError with all the defects of single entries.
    """
    folder, path = Path(images), Path(annotations)
    _require(folder, "folder of images")
    _require(path, "COCO JSON file")
    content = path.read_bytes()
    top = _top_level(path, content)
    defects: list[Defect] = []
    categories = _categories(top["categories"], defects)
    entries = _images(top["images"], folder, defects)
    _annotations(top["annotations"], entries, {category.id for category in categories}, defects)
    if not defects and not (entries and categories):
        defects.append(
            Defect(f"it lists {len(entries)} images and {len(categories)} categories; expected some of each")
        )
    if defects:
        raise SourceError(path, defects)
    rest = msgspec.json.encode({key: raw for key, raw in top.items() if key not in ("images", "annotations")})
    return Source(path, folder, hashlib.sha256(content).hexdigest(), categories, list(entries.values()), rest)


def read_image(source: Source, entry: ImageEntry) -> tuple[bytes, str] | Defect:
    """An image file's bytes and the extension that its content deserves, or what is wrong with it.

    The image is decoded (JPEGs at an eighth of their size, which still reads every byte of the compressed data), so
    that a damaged file is found here and not in the middle of a training run.
    """
    try:
        content = (source.folder / entry.file_name).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            kind, found = image.format or "", image.size
            image.draft("L", (1, 1))
            image.load()
    except UnidentifiedImageError:
        return Defect(f"image {entry.id} ({entry.file_name}): not an image that Pillow can read")
    except Exception as error:  # Pillow's plugins raise nearly anything for damaged bytes
        return Defect(f"image {entry.id} ({entry.file_name}): cannot be decoded: {error}")
    if kind not in EXTENSIONS:
        return Defect(f"image {entry.id} ({entry.file_name}): its format {kind} is none of {', '.join(EXTENSIONS)}")
    if found != (entry.width, entry.height):
        return Defect(
            f"image {entry.id} ({entry.file_name}): is {found[0]}x{found[1]} pixels (before any EXIF rotation), but "
            f"the JSON says {entry.width}x{entry.height}"
        )
    return content, EXTENSIONS[kind]


def _require(path: Path, kind: str) -> None:
    if not path.exists():
        raise ShardError(f"{path}: no such {kind}; expected the path of an existing one: check it for a typo")
    if path.is_dir() != kind.startswith("folder"):
        found = "folder" if path.is_dir() else "file"
        raise ShardError(f"{path}: is a {found}, expected a {kind}: check that --images and --annotations are right")


def _top_level(path: Path, content: bytes) -> dict[str, msgspec.Raw]:
    try:
        top = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
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


def _lenient(path: Path, content: bytes) -> dict[str, msgspec.Raw]:
    """Python writes NaN and Infinity, which are not JSON: read them as text, so that a defect can name the entry."""
    try:
        data = json.loads(content, parse_constant=str)
        return msgspec.json.decode(msgspec.json.encode(data), type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{path}: not JSON ({error}); expected COCO's instances format") from None


def _entries(raw: msgspec.Raw, kind: str, fields: Any, defects: list[Defect]) -> list[tuple[msgspec.Raw, Any]]:
    """Each entry of a list of the file with its typed fields; what does not fit the type becomes a defect."""
    try:
        raws = msgspec.json.decode(raw, type=list[msgspec.Raw])
    except msgspec.ValidationError as error:
        defects.append(Defect(f"{kind}: {error}"))
        return []
    decoder = msgspec.json.Decoder(fields)
    entries = []
    for number, one in enumerate(raws):
        try:
            entries.append((one, decoder.decode(one)))
        except msgspec.ValidationError as error:
            defects.append(Defect(f"{kind}[{number}]: {str(error).replace('`', '')}"))
    return entries


def _categories(raw: msgspec.Raw, defects: list[Defect]) -> tuple[Category, ...]:
    found: dict[int, Category] = {}
    for _, fields in _entries(raw, "categories", _CategoryFields, defects):
        if fields.id in found:
            defects.append(Defect(f"category id {fields.id} is given twice"))
        found[fields.id] = Category(fields.id, fields.name)
    return tuple(found[number] for number in sorted(found))


def _images(raw: msgspec.Raw, folder: Path, defects: list[Defect]) -> dict[int, ImageEntry]:
    present = set(os.listdir(folder))  # one listing instead of one question per image
    found: dict[int, ImageEntry] = {}
    for text, fields in _entries(raw, "images", _ImageFields, defects):
        who = f"image {fields.id} ({fields.file_name})"
        name = PurePosixPath(fields.file_name)
        if not 0 <= fields.id < 10**12:
            defects.append(Defect(f"{who}: its id is not in 0..999999999999"))
        if fields.id in found:
            defects.append(Defect(f"{who}: its id is given twice"))
        if fields.width < 1 or fields.height < 1:
            defects.append(Defect(f"{who}: its size is {fields.width}x{fields.height}"))
        if name.is_absolute() or ".." in name.parts:
            defects.append(Defect(f"{who}: its file name leaves the folder of images"))
        elif not (fields.file_name in present or (folder / name).is_file()):
            defects.append(Defect(f"{who}: no such file in {folder}"))
        found[fields.id] = ImageEntry(fields.id, fields.file_name, fields.width, fields.height, text)
    return found


def _annotations(raw: msgspec.Raw, images: dict[int, ImageEntry], categories: set[int], defects: list[Defect]) -> None:
    """Append every sound annotation to its image."""
    seen: set[int] = set()
    for text, fields in _entries(raw, "annotations", _AnnotationFields, defects):
        x, y, width, height = map(float, fields.bbox)
        area = width * height if fields.area is None else float(fields.area)
        problem = ""
        if fields.id in seen:
            problem = "its id is given twice"
        elif fields.image_id not in images:
            problem = "no such image is listed"
        elif fields.category_id not in categories:
            problem = f"its category {fields.category_id} is not listed"
        elif not math.isfinite(x + y + width + height + area):
            problem = f"its box {[x, y, width, height]} or area {area} is not finite"
        elif width < 0 or height < 0 or area < 0:
            problem = f"its box {[x, y, width, height]} or area {area} is negative"
        elif fields.iscrowd not in (0, 1):
            problem = f"its iscrowd is {fields.iscrowd}, not 0 or 1"
        if problem:
            defects.append(Defect(f"annotation {fields.id} of image {fields.image_id}: {problem}"))
            continue
        seen.add(fields.id)
        entry = AnnotationEntry(fields.id, fields.category_id, (x, y, width, height), area, fields.iscrowd, text)
        images[fields.image_id].annotations.append(entry)
