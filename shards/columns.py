"""The entries of a COCO JSON as columns: numbers in arrays, and the text of each entry by reference into the file.

Whatever else a file says about an image or an annotation survives into the shards through that text. Of a million
entries each is one object, its text, and only some thousand at a time are decoded ones with their fields.
"""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from shards.defects import Defect
from shards.index import Ints

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Texts = list[msgspec.Raw]

_CHUNK = 4096  # entries that are decoded at once
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_Pixels = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]
# What JSON cannot say but Python's writer does; kept as text until the check that names the annotation.
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
    """Images; sizes in pixels, ``names`` relative to the folder of images, ``texts`` their JSON."""

    ids: Ints
    widths: Ints
    heights: Ints
    names: list[str]
    texts: Texts

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Ints) -> "ImageColumns":
        """Those of ``rows``, in that order."""
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        picked = rows.tolist()
        return ImageColumns(
            self.ids[rows],
            self.widths[rows],
            self.heights[rows],
            [self.names[row] for row in picked],
            [self.texts[row] for row in picked],
        )


@dataclass(frozen=True, eq=False)
class AnnotationColumns:
    """Annotations; ``boxes`` float64 [N, 4] are x, y, width, height in pixels as in the file, ``texts`` their JSON."""

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
    """Columns of the JSON's images; what does not fit becomes a defect and is left out."""
    ids, widths, heights = (np.empty(len(raws), np.int64) for _ in range(3))
    names: list[str] = []
    texts: Texts = []
    for piece, entries in _typed(raws, "images", _Image, _Image, defects):
        span = slice(len(texts), len(texts) + len(entries))
        for column, field in ((ids, "id"), (widths, "width"), (heights, "height")):
            column[span] = _integers(entries, field)
        names += [entry.file_name for entry in entries]
        texts += piece
    count = len(texts)
    return ImageColumns(ids[:count], widths[:count], heights[:count], names, texts)


def annotation_columns(raws: Texts, defects: list[Defect]) -> AnnotationColumns:
    """Columns of the JSON's annotations; what does not fit becomes a defect and is left out.

    An annotation without an area has that of its box, one without ``iscrowd`` is no crowd.
    """
    ids, image_ids, category_ids, iscrowd = (np.empty(len(raws), np.int64) for _ in range(4))
    integers = ((ids, "id"), (image_ids, "image_id"), (category_ids, "category_id"), (iscrowd, "iscrowd"))
    boxes, areas = np.empty((len(raws), 4)), np.empty(len(raws))
    texts: Texts = []
    for piece, entries in _typed(raws, "annotations", _Annotation, _LenientAnnotation, defects):
        span = slice(len(texts), len(texts) + len(entries))
        for column, field in integers:
            column[span] = _integers(entries, field)
        numbers = itertools.chain.from_iterable(map(_box, entries))
        boxes[span] = np.fromiter(numbers, np.float64, 4 * len(entries)).reshape(-1, 4)
        areas[span] = [entry.bbox[2] * entry.bbox[3] if entry.area is None else entry.area for entry in entries]
        texts += piece
    count = len(texts)
    return AnnotationColumns(
        ids[:count], image_ids[:count], category_ids[:count], boxes[:count], areas[:count], iscrowd[:count], texts
    )


def duplicated(ids: Ints) -> Mask:
    """bool [N]: which ids occur more than once."""
    _, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] > 1)


def repeated(ids: Ints) -> Mask:
    """bool [N]: which ids occurred before."""
    ordered = np.sort(ids)
    if not (ordered[1:] == ordered[:-1]).any():  # nearly always, and by far the quicker question
        return np.zeros(len(ids), np.bool_)
    found = np.ones(len(ids), np.bool_)
    found[np.unique(ids, return_index=True)[1]] = False
    return found


def positions(values: Ints, known: Ints) -> Ints:
    """int64 [N]: where each value is among ``known``, which differ; -1 for one that is not."""
    if not len(known):
        return np.full(len(values), -1, np.int64)
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    found = np.minimum(np.searchsorted(ordered, values), len(known) - 1)
    return np.where(ordered[found] == values, order[found], -1)


_box = operator.attrgetter("bbox")


def _integers(entries: list[Any], field: str) -> Ints:
    return np.fromiter(map(operator.attrgetter(field), entries), np.int64, len(entries))


def _typed(
    raws: Texts, where: str, kind: Any, lenient: Any, defects: list[Defect]
) -> Iterator[tuple[Texts, list[Any]]]:
    """Entries with their texts, some at a time."""
    decode = msgspec.json.Decoder(kind).decode
    for start in range(0, len(raws), _CHUNK):
        piece = raws[start : start + _CHUNK]
        try:
            entries = list(map(decode, piece))
        except msgspec.ValidationError:
            piece, entries = _one_by_one(piece, start, where, kind, lenient, defects)
        yield piece, entries


def _one_by_one(
    piece: Texts, start: int, where: str, kind: Any, lenient: Any, defects: list[Defect]
) -> tuple[Texts, list[Any]]:
    """A slow way that takes NaN for a number and says which entry does not fit."""
    decoder = msgspec.json.Decoder(lenient)
    texts, entries = [], []
    for number, raw in enumerate(piece, start):
        try:
            entry = decoder.decode(raw)
        except msgspec.ValidationError as error:
            defects.append(_malformed(raw, f"{where}[{number}]", str(error).replace("`", "")))
            continue
        # Text becomes a number by `strict=False`, which knows NaN and the infinities.
        entries.append(msgspec.convert(msgspec.structs.asdict(entry), kind, strict=False))
        texts.append(raw)
    return texts, entries


def _malformed(raw: msgspec.Raw, place: str, problem: str) -> Defect:
    number = _said_id(raw, "id")
    if place.startswith("images"):
        who = "" if number is None else f" (image {number})"
        return Defect(f"{place}{who}: {problem}", image_id=number)
    image_id = _said_id(raw, "image_id")
    ours, owner = ("?" if one is None else one for one in (number, image_id))
    who = "" if number is None and image_id is None else f" (annotation {ours} of image {owner})"
    return Defect(f"{place}{who}: {problem}", image_id=image_id, annotation_id=number)


def _said_id(raw: msgspec.Raw, field: str) -> int | None:
    """What an entry that does not fit means by one of its ids, "5" and 5.0 included; None where that cannot be told."""
    try:
        said = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])[field]
        return msgspec.json.decode(said, type=Int64, strict=False)
    except (msgspec.DecodeError, KeyError):
        return None
