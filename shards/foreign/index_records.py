"""Conversion of samples in foreign tars to the records of an index: ids, checks and defects."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from shards.arrays import Ints, Mask, Records
from shards.dataset.categories import Category
from shards.dataset.index import ANNOTATION_DTYPE, IMAGE_DTYPE
from shards.dataset.manifest import Shard
from shards.foreign.tar_samples import ForeignSample, ForeignTar
from shards.source.checks import MAX_IMAGE_ID, check_annotations
from shards.source.columns import AnnotationColumns, ImageColumns
from shards.source.defects import Defect
from shards.source.images import COLOURS

_UNKNOWN = -1  # category id that no COCO JSON has


@dataclass(frozen=True, eq=False)
class ForeignIndex:
    """Samples and annotations of all tars, with their defects.

    samples: valid samples in the order of the tars.
    ids: int64 [samples], their image ids.
    tars: int64 [samples], the number of each one's tar.
    annotations: of all samples, in their order; category ids are those of `categories`.
    rows: int64 [annotations], the number of each one's sample.
    categories: in ascending order of their ids.
    defects: of all samples; a defect has the image id if its sample could be read.
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
        """Samples without a rejected annotation or other defect, bool [samples].

        A sample is rejected as a whole, because its tar is not rewritten.
        """
        rejected = {defect.image_id for defect in self.defects if defect.rejected}
        return np.array([image_id not in rejected for image_id in self.ids.tolist()], np.bool_)


def gather(tars: Sequence[ForeignTar], ids: Ints, categories: tuple[Category, ...]) -> ForeignIndex:
    """Join and check the samples of all tars; `ids` are those of `image_ids`."""
    samples = samples_of(tars)
    rows = np.repeat(np.arange(len(samples)), [len(sample.objects) for sample in samples])
    annotations = _annotations(samples, ids, categories, rows)
    defects = [item for tar in tars for item in tar.found if isinstance(item, Defect)]
    tar_numbers = [number for number, tar in enumerate(tars) for item in tar.found if isinstance(item, ForeignSample)]
    names = [
        f"{tars[number].shard.name}: sample {sample.key}" for number, sample in zip(tar_numbers, samples, strict=True)
    ]
    defects += _alike(samples, ids, names)
    for sample, image_id, name in zip(samples, ids.tolist(), names, strict=True):
        defects += _notes(sample, image_id, name)
    images = ImageColumns(
        ids,
        np.array([sample.info.size[0] for sample in samples], np.int64),
        np.array([sample.info.size[1] for sample in samples], np.int64),
        [sample.key for sample in samples],
        [],
    )
    category_ids = np.array([category.id for category in categories], np.int64)
    known = annotations.category_ids != _UNKNOWN
    annotation_defects = _of_categories(samples, annotations, known)
    annotation_defects += check_annotations(annotations, known, images, ids, category_ids)[2]
    name_of = dict(zip(ids.tolist(), names, strict=True))
    for defect in annotation_defects:
        assert defect.image_id is not None
        defects.append(msgspec.structs.replace(defect, text=f"{name_of[defect.image_id]}: {defect.text}"))
    return ForeignIndex(samples, ids, np.array(tar_numbers, np.int64), annotations, rows, categories, defects)


def samples_of(tars: Sequence[ForeignTar]) -> list[ForeignSample]:
    """Return the valid samples in the order of the tars."""
    return [item for tar in tars for item in tar.found if isinstance(item, ForeignSample)]


def image_ids(tars: Sequence[ForeignTar]) -> Ints:
    """Return the image ids of the valid samples, int64 [samples].

    These are the ids in their JSON if all have one, else their keys if these are distinct numbers, else the positions
    of the samples, counted from 1 over all tars.
    """
    samples = samples_of(tars)
    ids = [sample.image_id for sample in samples if sample.image_id is not None]
    if len(ids) == len(samples) and all(0 <= image_id <= MAX_IMAGE_ID for image_id in ids):
        return np.array(ids, np.int64)
    keys = [sample.key.rpartition("/")[2] for sample in samples]
    numbers = [int(key) for key in keys if key.isascii() and key.isdecimal()]
    if len(set(numbers)) == len(samples) and max(numbers, default=0) <= MAX_IMAGE_ID:
        return np.array(numbers, np.int64)
    items = [item for tar in tars for item in tar.found]
    return np.array([row for row, item in enumerate(items, 1) if isinstance(item, ForeignSample)], np.int64)


def records(index: ForeignIndex, shards: Sequence[Shard]) -> tuple[list[Shard], Records, Records]:
    """Return the shards with usable samples, and the index records of their images and annotations."""
    usable = index.usable
    kept = [sample for sample, use in zip(index.samples, usable.tolist(), strict=True) if use]
    numbers, positions = np.unique(index.tars[usable], return_inverse=True)
    counts = np.bincount(positions, minlength=len(numbers)).tolist()
    images = np.zeros(len(kept), IMAGE_DTYPE)
    images["image_id"] = index.ids[usable]
    images["shard"] = positions
    images["width"] = [sample.info.size[0] for sample in kept]
    images["height"] = [sample.info.size[1] for sample in kept]
    for field in ("offset", "length", "crc32"):
        images[field] = [getattr(sample.image, field) for sample in kept]
        images[f"text_{field}"] = [0 if sample.text is None else getattr(sample.text, field) for sample in kept]
    images["count"] = [len(sample.objects) for sample in kept]
    images["first"] = np.cumsum(images["count"]) - images["count"]
    columns, chosen = index.annotations, usable[index.rows]
    annotations = np.zeros(int(chosen.sum()), ANNOTATION_DTYPE)
    annotations["annotation_id"] = columns.ids[chosen]
    annotations["image"] = np.repeat(np.arange(len(kept)), images["count"])
    annotations["bbox"] = columns.boxes[chosen]
    annotations["area"] = columns.areas[chosen]
    category_ids = [category.id for category in index.categories]
    annotations["label"] = np.searchsorted(category_ids, columns.category_ids[chosen])
    annotations["iscrowd"] = columns.iscrowd[chosen]
    used_shards = [
        msgspec.structs.replace(shards[number], samples=count)
        for number, count in zip(numbers.tolist(), counts, strict=True)
    ]
    return used_shards, images, annotations


def _annotations(
    samples: Sequence[ForeignSample], ids: Ints, categories: Sequence[Category], rows: Ints
) -> AnnotationColumns:
    """Return the columns of all annotations, with the ids in the tars if they are distinct, else numbers from 1."""
    category_id_of: dict[int | str | None, int] = {category.name: category.id for category in categories}
    category_id_of |= {category.id: category.id for category in categories}
    objects = [entry for sample in samples for entry in sample.objects]
    numbers = [entry.id for entry in objects if isinstance(entry.id, int)]
    if len(set(numbers)) < len(objects):
        numbers = list(range(1, len(objects) + 1))
    areas = [entry.bbox[2] * entry.bbox[3] if entry.area is None else entry.area for entry in objects]
    return AnnotationColumns(
        ids=np.array(numbers, np.int64),
        image_ids=ids[rows],
        category_ids=np.array([category_id_of.get(entry.kind, _UNKNOWN) for entry in objects], np.int64),
        boxes=np.array([entry.bbox for entry in objects], np.float64).reshape(-1, 4),
        areas=np.array(areas, np.float64),
        iscrowd=np.array([entry.iscrowd for entry in objects], np.int64),
        texts=[msgspec.Raw()] * len(objects),
    )


def _of_categories(samples: Sequence[ForeignSample], annotations: AnnotationColumns, known: Mask) -> list[Defect]:
    """Return a defect for each annotation of an unknown category."""
    objects = [entry for sample in samples for entry in sample.objects]
    defects = []
    for row in np.flatnonzero(~known).tolist():
        number, image_id, kind = int(annotations.ids[row]), int(annotations.image_ids[row]), objects[row].kind
        problem = "has no category_id and no category" if kind is None else f"its category {kind!r} is not listed"
        text = f"annotation {number} of image {image_id}: {problem}"
        defects.append(Defect(text, "unknown-category", image_id, number))
    return defects


def _alike(samples: Sequence[ForeignSample], ids: Ints, names: Sequence[str]) -> list[Defect]:
    """Return a defect for each sample whose key or image id is not unique."""
    key_counts = Counter(sample.key for sample in samples)
    id_counts = Counter(ids.tolist())
    defects = []
    for sample, image_id, name in zip(samples, ids.tolist(), names, strict=True):
        if key_counts[sample.key] > 1:
            problem = f"its key is that of {key_counts[sample.key]} samples"
        elif id_counts[image_id] > 1:
            problem = f"its image id {image_id} is that of {id_counts[image_id]} samples"
        else:
            continue
        defects.append(Defect(f"{name}: {problem}", "duplicate-image-id", image_id))
    return defects


def _notes(sample: ForeignSample, image_id: int, name: str) -> list[Defect]:
    """Return the notes on a sample's image."""
    notes, colours = [], sample.info.colours
    if sample.info.orientation != 1:
        problem = f"its EXIF orientation {sample.info.orientation} is ignored, as the boxes are of the pixels"
        notes.append(Defect(f"{name}: {problem}", "exif-orientation", image_id))
    if colours:
        notes.append(Defect(f"{name}: {COLOURS[colours]}", colours, image_id))
    return notes
