"""Entries of a COCO JSON in columns: numbers in arrays, and the JSON text of each entry as a reference into the file.

The text carries all other fields of an image or annotation into the shards. Memory stays small: each entry is one
object, its text, and only a few thousand entries at a time are decoded.
"""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np

from shards.arrays import Floats, Ints, Mask
from shards.source.defects import Defect

Texts = list[msgspec.Raw]
_CHUNK = 4096  # entries decoded at once
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Pixels = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]

# Values that are not valid JSON but that Python's json module writes; kept as text until the annotation is checked.
_Number = float | Literal["NaN", "Infinity", "-Infinity"]


class _Image(msgspec.Struct, gc=False):
    id: Int64
    file_name: str
    width: _Pixels
    height: _Pixels


class _Annotation(msgspec.Struct, gc=False):
    id: Int64
    image_id: Int64
    category_id: Int64
    bbox: tuple[float, float, float, float]
    area: float | None = None
    iscrowd: Int64 = 0


class _LenientAnnotation(msgspec.Struct, gc=False):
    id: Int64
    image_id: Int64
    category_id: Int64
    bbox: tuple[_Number, _Number, _Number, _Number]
    area: _Number | None = None
    iscrowd: Int64 = 0


@dataclass(frozen=True, eq=False)
class ImageColumns:
    """Images: sizes in pixels, `names` relative to the folder of images, `texts` their JSON."""

    ids: Ints
    widths: Ints
    heights: Ints
    names: list[str]
    texts: Texts

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Ints) -> "ImageColumns":
        """Return the images of `rows`, in that order."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        chosen = rows.tolist()
        return ImageColumns(
            self.ids[rows],
            self.widths[rows],
            self.heights[rows],
            [self.names[row] for row in chosen],
            [self.texts[row] for row in chosen],
        )


@dataclass(frozen=True, eq=False)
class AnnotationColumns:
    """Annotations: `boxes` float64 [N, 4] are x, y, width, height in pixels as in the file, `texts` their JSON."""

    ids: Ints
    image_ids: Ints
    category_ids: Ints
    boxes: Floats
    areas: Floats
    iscrowd: Ints
    texts: Texts

    def __len__(self) -> int:
        return len(self.ids)


def image_columns(raws: Texts, defects: list[Defect]) -> ImageColumns:
    """Return the columns of the JSON's images; append a defect for each malformed one, which is left out."""
    ids = np.empty(len(raws), np.int64)
    widths = np.empty_like(ids)
    heights = np.empty_like(ids)
    names: list[str] = []
    texts: Texts = []
    for chunk, entries in _typed(raws, "images", _Image, _Image, defects):
        span = slice(len(texts), len(texts) + len(entries))
        ids[span] = _integers(entries, "id")
        widths[span] = _integers(entries, "width")
        heights[span] = _integers(entries, "height")
        names += [entry.file_name for entry in entries]
        texts += chunk
    count = len(texts)
    return ImageColumns(ids[:count], widths[:count], heights[:count], names, texts)


def annotation_columns(raws: Texts, defects: list[Defect]) -> AnnotationColumns:
    """Return the columns of the JSON's annotations; append a defect for each malformed one, which is left out.

    An annotation without an area gets that of its box; one without `iscrowd` is no crowd.
    """
    ids = np.empty(len(raws), np.int64)
    image_ids = np.empty_like(ids)
    category_ids = np.empty_like(ids)
    iscrowd = np.empty_like(ids)
    boxes = np.empty((len(raws), 4))
    areas = np.empty(len(raws))
    texts: Texts = []
    for chunk, entries in _typed(raws, "annotations", _Annotation, _LenientAnnotation, defects):
        span = slice(len(texts), len(texts) + len(entries))
        ids[span] = _integers(entries, "id")
        image_ids[span] = _integers(entries, "image_id")
        category_ids[span] = _integers(entries, "category_id")
        iscrowd[span] = _integers(entries, "iscrowd")
        numbers = itertools.chain.from_iterable(map(_box, entries))
        boxes[span] = np.fromiter(numbers, np.float64, 4 * len(entries)).reshape(-1, 4)
        areas[span] = [entry.bbox[2] * entry.bbox[3] if entry.area is None else entry.area for entry in entries]
        texts += chunk
    count = len(texts)
    return AnnotationColumns(
        ids[:count], image_ids[:count], category_ids[:count], boxes[:count], areas[:count], iscrowd[:count], texts
    )


def duplicated(ids: Ints) -> Mask:
    """Return a mask of the ids that occur more than once, bool [N]."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] > 1)


def repeated(ids: Ints) -> Mask:
    """Return a mask of the ids that occurred before, bool [N]."""
    ordered = np.sort(ids)
    if not (ordered[1:] == ordered[:-1]).any():  # the usual case, and much faster to check
        return np.zeros(len(ids), np.bool_)
    found = np.ones(len(ids), np.bool_)
    found[np.unique(ids, return_index=True)[1]] = False
    return found


def positions(values: Ints, known: Ints) -> Ints:
    """Return the position of each value among the distinct values `known`, int64 [N]; -1 if it is not there."""
    if not len(known):
        return np.full(len(values), -1, np.int64)
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    found = np.minimum(np.searchsorted(ordered, values), len(known) - 1)
    return np.where(ordered[found] == values, order[found], -1)


_box = operator.attrgetter("bbox")


def _integers(entries: list[Any], field: str) -> Ints:
    return np.fromiter(map(operator.attrgetter(field), entries), np.int64, len(entries))


def _typed(raws: Texts, key: str, kind: Any, lenient: Any, defects: list[Defect]) -> Iterator[tuple[Texts, list[Any]]]:
    """Yield chunks of texts with their decoded entries; `key` is the entries' key in the JSON, for messages."""
    decode = msgspec.json.Decoder(kind).decode
    for start in range(0, len(raws), _CHUNK):
        chunk = raws[start : start + _CHUNK]
        try:
            entries = list(map(decode, chunk))
        except msgspec.ValidationError:
            chunk, entries = _one_by_one(chunk, start, key, kind, lenient, defects)
        yield chunk, entries


def _one_by_one(
    chunk: Texts, start: int, key: str, kind: Any, lenient: Any, defects: list[Defect]
) -> tuple[Texts, list[Any]]:
    """Decode a chunk slowly: accept NaN and infinities, and append a defect for each malformed entry."""
    decoder = msgspec.json.Decoder(lenient)
    texts, entries = [], []
    for number, raw in enumerate(chunk, start):
        try:
            entry = decoder.decode(raw)
        except msgspec.ValidationError as error:
            defects.append(_malformed(raw, f"{key}[{number}]", str(error).replace("`", "")))
            continue
        # `strict=False` converts text to numbers, including NaN and the infinities.
        entries.append(msgspec.convert(msgspec.structs.asdict(entry), kind, strict=False))
        texts.append(raw)
    return texts, entries


def _malformed(raw: msgspec.Raw, position: str, problem: str) -> Defect:
    number = id_in(raw, "id")
    if position.startswith("images"):
        name = "" if number is None else f" (image {number})"
        return Defect(f"{position}{name}: {problem}", image_id=number)
    image_id = id_in(raw, "image_id")
    if number is None and image_id is None:
        return Defect(f"{position}: {problem}")
    annotation = "?" if number is None else number
    image = "?" if image_id is None else image_id
    text = f"{position} (annotation {annotation} of image {image}): {problem}"
    return Defect(text, image_id=image_id, annotation_id=number)


def id_in(raw: msgspec.Raw, field: str) -> int | None:
    """Return the integer id in a field of a malformed entry, if it has one; "5" and 5.0 count."""
    try:
        value = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])[field]
        return msgspec.json.decode(value, type=Int64, strict=False)
    except (msgspec.DecodeError, KeyError):
        return None
