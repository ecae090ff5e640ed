"""Samples of foreign tars as the records of an index: which id each gets, which can be used, and why others cannot."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from shards.checks import MAX_IMAGE_ID, check_annotations
from shards.columns import AnnotationColumns, ImageColumns, Mask
from shards.defects import Defect
from shards.foreign import ForeignSample, ForeignTar
from shards.images import COLOURS
from shards.index import ANNOTATION_DTYPE, IMAGE_DTYPE, Ints, Records
from shards.manifest import Category, Shard

_UNKNOWN = -1  # of a category; no COCO JSON has negative ones


@dataclass(frozen=True, eq=False)
class ForeignIndex:
    """What all the tars hold.

    Attributes:
        samples: those that were read, in the order of the tars.
        ids: int64 [samples], their image ids.
        tars: int64 [samples], the tar of each.
        annotations: of all samples, in their order; category ids are those of ``categories``.
        rows: int64 [annotations], the sample of each.
        categories: in ascending order of their ids.
        defects: what is wrong with samples, read or not, or worth knowing; those of a sample that was read say its id.
    """

    samples: list[ForeignSample]
    ids: Ints
    tars: Ints
    annotations: AnnotationColumns
    rows: Ints
    categories: tuple[Category, ...]
    defects: list[Defect]

    @property
    def usable(self) -> Mask:
        """bool [samples]: with nothing that is wrong. One bad annotation takes its sample out, masks and all."""
        rejected = {defect.image_id for defect in self.defects if defect.rejected}
        return np.array([image_id not in rejected for image_id in self.ids.tolist()], np.bool_)


def gather(tars: Sequence[ForeignTar], ids: Ints, categories: tuple[Category, ...]) -> ForeignIndex:
    """Join the tars' samples; ``ids`` are from ``image_ids``."""
    samples = samples_of(tars)
    rows = np.repeat(np.arange(len(samples)), [len(sample.objects) for sample in samples])
    annotations = _annotations(samples, ids, categories, rows)
    defects = [one for tar in tars for one in tar.found if isinstance(one, Defect)]
    numbers = [number for number, tar in enumerate(tars) for one in tar.found if isinstance(one, ForeignSample)]
    who = [f"{tars[number].shard.name}: sample {sample.key}" for number, sample in zip(numbers, samples, strict=True)]
    defects += _alike(samples, ids, who)
    for sample, image_id, name in zip(samples, ids.tolist(), who, strict=True):
        defects += _notes(sample, image_id, name)
    images = ImageColumns(
        ids,
        np.array([sample.look.size[0] for sample in samples], np.int64),
        np.array([sample.look.size[1] for sample in samples], np.int64),
        [sample.key for sample in samples],
        [],
    )
    category_ids = np.array([category.id for category in categories], np.int64)
    known = annotations.category_ids != _UNKNOWN
    found = _of_categories(samples, annotations, known)
    found += check_annotations(annotations, known, images, ids, category_ids)[2]
    names = dict(zip(ids.tolist(), who, strict=True))
    defects += [msgspec.structs.replace(one, text=f"{names[one.image_id or 0]}: {one.text}") for one in found]
    return ForeignIndex(samples, ids, np.array(numbers, np.int64), annotations, rows, categories, defects)


def samples_of(tars: Sequence[ForeignTar]) -> list[ForeignSample]:
    """Those that were read, in the order of the tars."""
    return [one for tar in tars for one in tar.found if isinstance(one, ForeignSample)]


def image_ids(tars: Sequence[ForeignTar]) -> Ints:
    """int64 [samples]: what the JSON of all says, else the number that every key is, else positions in the tars from 1."""
    samples = samples_of(tars)
    said = [sample.image_id for sample in samples if sample.image_id is not None]
    if len(said) == len(samples) and all(0 <= one <= MAX_IMAGE_ID for one in said):
        return np.array(said, np.int64)
    keys = [sample.key.rpartition("/")[2] for sample in samples]
    numbers = [int(key) for key in keys if key.isascii() and key.isdecimal()]
    if len(set(numbers)) == len(samples) and max(numbers, default=0) <= MAX_IMAGE_ID:
        return np.array(numbers, np.int64)
    found = [one for tar in tars for one in tar.found]
    return np.array([row for row, one in enumerate(found, 1) if isinstance(one, ForeignSample)], np.int64)


def records(index: ForeignIndex, shards: Sequence[Shard]) -> tuple[list[Shard], Records, Records]:
    """The shards with usable samples, IMAGE_DTYPE and ANNOTATION_DTYPE of these; rows are in the order of the tars."""
    usable = index.usable
    kept = [sample for sample, use in zip(index.samples, usable.tolist(), strict=True) if use]
    numbers, positions = np.unique(index.tars[usable], return_inverse=True)
    counts = np.bincount(positions, minlength=len(numbers)).tolist()
    images = np.zeros(len(kept), IMAGE_DTYPE)
    images["image_id"], images["shard"] = index.ids[usable], positions
    images["width"], images["height"] = [one.look.size[0] for one in kept], [one.look.size[1] for one in kept]
    for field in ("offset", "length", "crc32"):
        images[field] = [getattr(one.image, field) for one in kept]
        images[f"text_{field}"] = [0 if one.text is None else getattr(one.text, field) for one in kept]
    images["count"] = [len(one.objects) for one in kept]
    images["first"] = np.cumsum(images["count"]) - images["count"]
    columns, chosen = index.annotations, usable[index.rows]
    annotations = np.zeros(int(chosen.sum()), ANNOTATION_DTYPE)
    annotations["annotation_id"] = columns.ids[chosen]
    annotations["image"] = np.repeat(np.arange(len(kept)), images["count"])
    annotations["bbox"], annotations["area"] = columns.boxes[chosen], columns.areas[chosen]
    labels = [category.id for category in index.categories]
    annotations["label"] = np.searchsorted(labels, columns.category_ids[chosen])
    annotations["iscrowd"] = columns.iscrowd[chosen]
    tars = [msgspec.structs.replace(shards[one], samples=n) for one, n in zip(numbers.tolist(), counts, strict=True)]
    return tars, images, annotations


def _annotations(
    samples: Sequence[ForeignSample], ids: Ints, categories: Sequence[Category], rows: Ints
) -> AnnotationColumns:
    """Columns of all objects. Their ids are those that the tars give where all differ, else numbers from 1."""
    by_kind: dict[int | str | None, int] = {category.name: category.id for category in categories}
    by_kind |= {category.id: category.id for category in categories}
    objects = [one for sample in samples for one in sample.objects]
    said = [one.id for one in objects if isinstance(one.id, int)]
    boxes = np.array([one.bbox for one in objects], np.float64).reshape(-1, 4)
    areas = [one.bbox[2] * one.bbox[3] if one.area is None else one.area for one in objects]
    return AnnotationColumns(
        ids=np.array(said if len(set(said)) == len(objects) else range(1, len(objects) + 1), np.int64),
        image_ids=ids[rows],
        category_ids=np.array([by_kind.get(one.kind, _UNKNOWN) for one in objects], np.int64),
        boxes=boxes,
        areas=np.array(areas, np.float64),
        iscrowd=np.array([one.iscrowd for one in objects], np.int64),
        texts=[msgspec.Raw()] * len(objects),
    )


def _of_categories(samples: Sequence[ForeignSample], annotations: AnnotationColumns, known: Mask) -> list[Defect]:
    objects = [one for sample in samples for one in sample.objects]
    found = []
    for row in np.flatnonzero(~known).tolist():
        number, image_id, kind = int(annotations.ids[row]), int(annotations.image_ids[row]), objects[row].kind
        problem = "has no category_id and no category" if kind is None else f"its category {kind!r} is not listed"
        text = f"annotation {number} of image {image_id}: {problem}"
        found.append(Defect(text, "unknown-category", image_id, number))
    return found


def _alike(samples: Sequence[ForeignSample], ids: Ints, who: Sequence[str]) -> list[Defect]:
    """Samples that cannot be told apart."""
    keys, numbers = Counter(sample.key for sample in samples), Counter(ids.tolist())
    found = []
    for sample, image_id, name in zip(samples, ids.tolist(), who, strict=True):
        if keys[sample.key] > 1:
            problem = f"its key is that of {keys[sample.key]} samples"
        elif numbers[image_id] > 1:
            problem = f"its image id {image_id} is that of {numbers[image_id]} samples"
        else:
            continue
        found.append(Defect(f"{name}: {problem}", "duplicate-image-id", image_id))
    return found


def _notes(sample: ForeignSample, image_id: int, who: str) -> list[Defect]:
    notes, colours = [], sample.look.colours
    if sample.look.orientation != 1:
        problem = f"its EXIF orientation {sample.look.orientation} is ignored, as the boxes are of the pixels"
        notes.append(Defect(f"{who}: {problem}", "exif-orientation", image_id))
    if colours:
        notes.append(Defect(f"{who}: {COLOURS[colours]}", colours, image_id))
    return notes
