"""Reviewed corrections of labels, applied to a COCO file as it is read.

The file is JSON, `{"corrections": [...]}`, as `detr evaluate --report` proposes it. An entry with `"apply": false` is
left out, so that a reviewer only has to switch on what is right.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from shards.dataset.listed_files import read_listed
from shards.dataset.manifest import CORRECTIONS_NAME, Manifest
from shards.errors import ShardError
from shards.source.columns import AnnotationColumns
from shards.store import storage

Action = Literal["delete", "relabel", "move", "add"]
_NEEDS: dict[Action, tuple[str, ...]] = {
    "delete": ("annotation_id",),
    "relabel": ("annotation_id", "category_id"),
    "move": ("annotation_id", "bbox"),
    "add": ("image_id", "category_id", "bbox"),
}


class Correction(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One correction.

    delete: leave an annotation out. relabel: give it `category_id`. move: give it `bbox` (x, y, width, height in pixels)
    and drop its segmentation, which is no longer of this box. add: a new annotation of an image.
    `image_id`, if given, must be that of the annotation. `note` is for people.
    """

    action: Action
    apply: bool = True
    annotation_id: int | None = None
    image_id: int | None = None
    category_id: int | None = None
    bbox: tuple[float, float, float, float] | None = None
    note: str = ""


class _File(msgspec.Struct, forbid_unknown_fields=True):
    corrections: tuple[Correction, ...]


@dataclass(frozen=True)
class Corrections:
    """The corrections of a file, and its content."""

    path: Path
    entries: tuple[Correction, ...]
    """Entries to apply."""
    content: bytes

    @property
    def digest(self) -> str:
        """Sha256 of the file."""
        return hashlib.sha256(self.content).hexdigest()


def read_corrections(path: Path) -> Corrections:
    """Read and check a file of corrections; raise `ShardError` if it is missing or an entry is incomplete."""
    try:
        content = path.read_bytes()
        entries = msgspec.json.decode(content, type=_File).corrections
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file; expected the corrections that a person has reviewed") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ShardError(
            f'{path}: {error}; expected {{"corrections": [...]}} as `detr evaluate --report` writes it'
        ) from None
    applied = tuple(entry for entry in entries if entry.apply)
    for number, entry in enumerate(entries):
        absent = [name for name in _NEEDS[entry.action] if getattr(entry, name) is None]
        if absent:
            raise ShardError(f"{path}: corrections[{number}]: {entry.action} needs {' and '.join(absent)}")
        if entry.bbox is not None and not (all(map(math.isfinite, entry.bbox)) and min(entry.bbox[2:]) > 0):
            raise ShardError(
                f"{path}: corrections[{number}]: got bbox {entry.bbox}, expected a width and height above 0"
            )
    return Corrections(path, applied, content)


def kept_corrections(manifest: Manifest) -> dict[str, int]:
    """Return the number of corrections of each action that were applied to a data set, as the file in it lists them."""
    listed = next((file for file in manifest.files if file.name == CORRECTIONS_NAME), None)
    if listed is None:
        return {}
    content = read_listed(storage.join(manifest.url, CORRECTIONS_NAME), listed)
    entries = msgspec.json.decode(content, type=_File).corrections
    return dict(Counter(entry.action for entry in entries if entry.apply))


def corrected(
    corrections: Corrections, annotations: AnnotationColumns, image_ids: Sequence[int], category_ids: Sequence[int]
) -> AnnotationColumns:
    """Return the annotations with all corrections; raise `ShardError` for one that does not fit the data set."""
    known = Counter(annotations.ids.tolist())
    rows = {annotation_id: row for row, annotation_id in enumerate(annotations.ids.tolist())}
    images, categories = set(image_ids), set(category_ids)
    columns = replace(
        annotations,
        category_ids=annotations.category_ids.copy(),
        boxes=annotations.boxes.copy(),
        areas=annotations.areas.copy(),
        texts=list(annotations.texts),
    )
    kept = np.ones(len(annotations), np.bool_)
    added = []
    for entry in corrections.entries:
        _check(corrections.path, entry, annotations, known, rows, images, categories)
        if entry.action == "add":
            added.append(entry)
            continue
        assert entry.annotation_id is not None
        row = rows[entry.annotation_id]
        if entry.action == "delete":
            kept[row] = False
        elif entry.category_id is not None and entry.action == "relabel":
            columns.category_ids[row] = entry.category_id
            columns.texts[row] = _edited(columns.texts[row], {"category_id": entry.category_id})
        elif entry.bbox is not None:
            columns.boxes[row] = entry.bbox
            columns.areas[row] = entry.bbox[2] * entry.bbox[3]
            fields = {"bbox": entry.bbox, "area": float(columns.areas[row])}
            columns.texts[row] = _edited(columns.texts[row], fields, without=("segmentation",))
    return _with_added(_taken(columns, kept), added, int(annotations.ids.max(initial=0)) + 1)


def _check(
    path: Path,
    entry: Correction,
    annotations: AnnotationColumns,
    known: Counter[int],
    rows: dict[int, int],
    images: set[int],
    categories: set[int],
) -> None:
    name = f"{path}: {entry.action} of " + (
        f"image {entry.image_id}" if entry.action == "add" else f"annotation {entry.annotation_id}"
    )
    if entry.category_id is not None and entry.category_id not in categories:
        raise ShardError(f"{name}: there is no category {entry.category_id}; expected the id of a category of the data")
    if entry.annotation_id is None:
        if entry.image_id not in images:
            raise ShardError(f"{name}: there is no such image; expected corrections of this data set")
        return
    if known[entry.annotation_id] != 1:
        found = "several annotations have" if known[entry.annotation_id] else "no annotation has"
        raise ShardError(f"{name}: {found} this id; expected corrections of this data set")
    image_id = int(annotations.image_ids[rows[entry.annotation_id]])
    if entry.image_id is not None and entry.image_id != image_id:
        raise ShardError(
            f"{name}: it is of image {image_id}, not {entry.image_id}; expected corrections of this data set"
        )


def _edited(text: msgspec.Raw, fields: dict[str, Any], without: Sequence[str] = ()) -> msgspec.Raw:
    """Return an annotation's JSON with these fields, the others as they were."""
    entry = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    kept = {name: value for name, value in entry.items() if name not in without}
    return msgspec.Raw(msgspec.json.encode(kept | fields))


def _taken(columns: AnnotationColumns, kept: Any) -> AnnotationColumns:
    if kept.all():
        return columns
    return AnnotationColumns(
        columns.ids[kept],
        columns.image_ids[kept],
        columns.category_ids[kept],
        columns.boxes[kept],
        columns.areas[kept],
        columns.iscrowd[kept],
        [columns.texts[row] for row in np.flatnonzero(kept).tolist()],
    )


def _with_added(columns: AnnotationColumns, added: Sequence[Correction], first_id: int) -> AnnotationColumns:
    if not added:
        return columns
    ids = np.arange(first_id, first_id + len(added))
    boxes = np.array([entry.bbox for entry in added], np.float64)
    texts = [
        msgspec.Raw(
            msgspec.json.encode(
                {
                    "id": number,
                    "image_id": entry.image_id,
                    "category_id": entry.category_id,
                    "bbox": entry.bbox,
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
            )
        )
        for number, entry, box in zip(ids.tolist(), added, boxes, strict=True)
    ]
    return AnnotationColumns(
        np.concatenate([columns.ids, ids]),
        np.concatenate([columns.image_ids, np.array([entry.image_id for entry in added], np.int64)]),
        np.concatenate([columns.category_ids, np.array([entry.category_id for entry in added], np.int64)]),
        np.concatenate([columns.boxes, boxes]),
        np.concatenate([columns.areas, boxes[:, 2] * boxes[:, 3]]),
        np.concatenate([columns.iscrowd, np.zeros(len(added), np.int64)]),
        [*columns.texts, *texts],
    )
