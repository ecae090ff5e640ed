"""Someone else's WebDataset tars as a data set: indexed where they lie, and not touched.

``manifest.json``, ``source.json`` and ``index/`` are written beside the tars, the manifest last. Rows are in the order of
the tars' names and of the samples in them, so that tars of this project's writer get back the very index they had.
"""

import hashlib
import io
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shards import storage
from shards.document import MAX_ID, each, read_categories
from shards.errors import ShardError
from shards.foreign import ForeignSample, ForeignTar, Object, read_tar
from shards.manifest import (
    ANNOTATION_DTYPE,
    ANNOTATIONS_NAME,
    FORMAT,
    IMAGE_DTYPE,
    IMAGES_NAME,
    MANIFEST_NAME,
    SOURCE_NAME,
    Category,
    File,
    Manifest,
    Records,
    load_manifest,
)
from shards.source import Defect, SourceError, without_entries
from shards.write import Progress, WriteConfig


@dataclass(frozen=True)
class IndexConfig:
    """How to index tars.

    Attributes:
        categories: a file of categories (``shards.document.read_categories``). By default those of ``source.json``
            beside the tars, else the names in the tars, in alphabetical order. The COCO JSON that the tars were made
            from also gives the data set its name and its digest back.
        name: name of the data set; the categories file's where it is the source, else the folder's.
        unannotated: samples without annotations are images without objects, not defects.
        workers: threads, each reading whole tars.
    """

    categories: Path | None = None
    name: str | None = None
    unannotated: bool = False
    workers: int = 0


@dataclass(frozen=True)
class _Origin:
    """What is known beside the tars: categories, ``source.json``, and what the manifest says of where they come from."""

    categories: tuple[Category, ...]
    rest: bytes
    name: str
    digest: str


def index_tars(
    url: str | os.PathLike[str], config: IndexConfig | None = None, progress: Progress | None = None
) -> Manifest:
    """Index the tars in the folder ``url`` and write their manifest beside them; ``progress`` counts tars.

    Raises ShardError where there are no tars, where they are a data set already or where the folder cannot be written,
    and SourceError with what is wrong with all their samples.
    """
    config = config or IndexConfig()
    folder = _folder(url)
    paths = _tars(folder)
    tars = each(lambda path: read_tar(path, path.name, not config.unannotated), paths, config.workers, progress)
    samples = [sample for tar in tars for sample in tar.samples]
    defects = [defect for tar in tars for defect in tar.defects]
    ids, problems = _image_ids(samples)
    origin = _origin(folder, config, samples, ids, tars)
    annotations, more = _annotation_records(samples, origin.categories)
    defects += [*problems, *more]
    if defects:
        raise SourceError(folder, defects)
    images = _image_records(tars, ids)
    return _write(folder, origin, tars, images, annotations)


def _folder(url: str | os.PathLike[str]) -> Path:
    folder = storage.local_path(os.fspath(url))
    if folder is None:
        raise ShardError(
            f"{url}: is a remote URL, expected a local folder: index a copy and copy what is new beside it"
        )
    if not folder.is_dir():
        raise ShardError(f"{folder}: no such folder; expected one with WebDataset tars: check it for a typo")
    if (folder / MANIFEST_NAME).exists():
        raise ShardError(f"{folder}: is a data set already; delete its {MANIFEST_NAME} to have the tars indexed again")
    if not os.access(folder, os.W_OK):
        raise ShardError(
            f"{folder}: cannot be written, expected a place for an index beside the tars, as a manifest names no others: "
            "copy or link them to a folder that can"
        )
    return folder.absolute()


def _tars(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        packed = sorted(path.name for ending in ("*.tar.*", "*.tgz") for path in folder.glob(ending))
        found = f"only compressed ones, such as {packed[0]}: unpack them to plain tars" if packed else "none"
        raise ShardError(f"{folder}: expected WebDataset tars (*.tar), found {found}")
    return paths


def _image_ids(samples: Sequence[ForeignSample]) -> tuple[list[int], list[Defect]]:
    """An id for each sample: what the JSON of all says, else the number that every key is, else the position from 1."""
    defects = [Defect(f"key {key} is of {count} samples") for key, count in _twice(one.key for one in samples)]
    said = [one.image_id for one in samples]
    ids = [one for one in said if one is not None]
    keys = [one.key.rpartition("/")[2] for one in samples]
    if len(ids) < len(samples):
        numbers = [int(key) for key in keys if key.isascii() and key.isdecimal()]
        unique = len(set(numbers)) == len(samples) and max(numbers, default=0) <= MAX_ID
        return (numbers if unique else list(range(1, len(samples) + 1))), defects
    for number, count in _twice(ids):
        named = [one.key for one in samples if one.image_id == number]
        defects.append(Defect(f"image id {number} is of {count} samples: {', '.join(named[:3])}"))
    for sample, number in zip(samples, ids, strict=True):
        if not 0 <= number <= MAX_ID:
            defects.append(Defect(f"sample {sample.key}: its image id {number} is not in 0..{MAX_ID}"))
    return ids, defects


def _twice(values: Iterable[Any]) -> list[tuple[Any, int]]:
    return [(value, count) for value, count in Counter(values).items() if count > 1]


class _Identity(msgspec.Struct):
    id: int


class _Listed(msgspec.Struct):
    images: list[_Identity]
    annotations: list[_Identity]


def _origin(
    folder: Path, config: IndexConfig, samples: Sequence[ForeignSample], ids: list[int], tars: Sequence[ForeignTar]
) -> _Origin:
    digest = hashlib.sha256("".join(tar.shard.sha256 for tar in tars).encode()).hexdigest()
    name, beside = config.name or folder.name, folder / SOURCE_NAME
    path = config.categories or (beside if beside.is_file() else None)
    if path is None:
        found = {one.kind for sample in samples for one in sample.objects}
        names = sorted(kind for kind in found if isinstance(kind, str))
        if not names or any(isinstance(kind, int) for kind in found):
            raise ShardError(
                f"{folder}: the tars do not name their categories; expected --categories FILE (a COCO JSON or names)"
            )
        categories = tuple(Category(number, kind) for number, kind in enumerate(names, 1))
        return _Origin(categories, _source({}, categories), name, digest)
    categories = read_categories(path, 1)
    content = path.read_bytes()
    try:
        top = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError):  # a list of names
        return _Origin(categories, _source({}, categories), name, digest)
    rest = without_entries(top)
    if path == beside:
        return _Origin(categories, content, name, digest)
    try:
        listed = msgspec.json.decode(content, type=_Listed)
    except msgspec.ValidationError:
        return _Origin(categories, rest, name, digest)
    count = sum(len(sample.objects) for sample in samples)
    if {one.id for one in listed.images} == set(ids) and len(listed.annotations) == count:
        return _Origin(categories, rest, config.name or path.stem, hashlib.sha256(content).hexdigest())
    return _Origin(categories, rest, name, digest)


def _source(info: dict[str, str], categories: Sequence[Category]) -> bytes:
    return msgspec.json.encode({"info": info, "categories": categories})


def _annotation_records(
    samples: Sequence[ForeignSample], categories: Sequence[Category]
) -> tuple[Records, list[Defect]]:
    """The records of all objects; ids are those that the tars give where all differ, else numbers from 1."""
    labels: dict[int | str | None, int] = {category.id: label for label, category in enumerate(categories)}
    labels |= {category.name: label for label, category in enumerate(categories)}
    objects = [(row, number, one) for row, sample in enumerate(samples) for number, one in enumerate(sample.objects, 1)]
    defects = []
    for row, number, one in objects:
        problem = _problem(one, labels)
        if problem:
            defects.append(Defect(f"sample {samples[row].key}: annotation {number}: {problem}"))
    if defects:
        return np.zeros(0, ANNOTATION_DTYPE), defects
    said = [one.id for _, _, one in objects if isinstance(one.id, int)]
    ids = said if len(set(said)) == len(objects) else range(1, len(objects) + 1)
    records = np.zeros(len(objects), ANNOTATION_DTYPE)
    records["annotation_id"] = ids
    records["image"] = [row for row, _, _ in objects]
    records["bbox"] = np.array([one.bbox for _, _, one in objects], np.float64).reshape(-1, 4)
    records["area"] = [one.bbox[2] * one.bbox[3] if one.area is None else one.area for _, _, one in objects]
    records["label"] = [labels[one.kind] for _, _, one in objects]
    records["iscrowd"] = [one.iscrowd for _, _, one in objects]
    return records, []


def _problem(one: Object, labels: dict[int | str | None, int]) -> str:
    area = 0.0 if one.area is None else one.area
    if one.kind is None:
        return "has no category_id and no category"
    if one.kind not in labels:
        return f"its category {one.kind!r} is not among the categories"
    if not math.isfinite(sum(one.bbox) + area) or min(*one.bbox[2:], area) < 0:
        return f"its box {list(one.bbox)} or area {area} is negative or not finite"
    return "" if one.iscrowd in (0, 1) else f"its iscrowd is {one.iscrowd}, not 0 or 1"


def _image_records(tars: Sequence[ForeignTar], ids: list[int]) -> Records:
    samples = [sample for tar in tars for sample in tar.samples]
    records = np.zeros(len(samples), IMAGE_DTYPE)
    records["image_id"] = ids
    records["shard"] = [number for number, tar in enumerate(tars) for _ in tar.samples]
    records["width"], records["height"] = [one.width for one in samples], [one.height for one in samples]
    for field in ("offset", "length", "crc32"):
        records[field] = [getattr(one.image, field) for one in samples]
        records[f"text_{field}"] = [0 if one.text is None else getattr(one.text, field) for one in samples]
    records["count"] = [len(one.objects) for one in samples]
    records["first"] = np.cumsum(records["count"]) - records["count"]
    return records


def _write(
    folder: Path, origin: _Origin, tars: Sequence[ForeignTar], images: Records, annotations: Records
) -> Manifest:
    """The index, and last of all the manifest."""
    contents = {SOURCE_NAME: origin.rest, IMAGES_NAME: _npy(images), ANNOTATIONS_NAME: _npy(annotations)}
    counts = [tar.shard.samples for tar in tars]
    even = len(counts) > 1 and len(set(counts[:-1])) == 1
    manifest = Manifest(
        format=FORMAT,
        name=origin.name,
        source_digest=origin.digest,
        # Not said by tars: as a writer of even shards would have had it.
        samples_per_shard=counts[0] if even else max([WriteConfig.samples_per_shard, *counts]),
        images=len(images),
        annotations=len(annotations),
        categories=origin.categories,
        files=tuple(File(name, len(one), hashlib.sha256(one).hexdigest()) for name, one in contents.items()),
        shards=tuple(tar.shard for tar in tars),
    )
    try:
        (folder / IMAGES_NAME).parent.mkdir(exist_ok=True)
        for name, content in contents.items():
            storage.write_atomic(folder / name, content)
        storage.sync_folder((folder / IMAGES_NAME).parent)
        storage.write_atomic(folder / MANIFEST_NAME, msgspec.json.format(manifest.to_json(), indent=2) + b"\n")
        storage.sync_folder(folder)
    except OSError as error:
        raise ShardError(f"{folder}: cannot be written: {error}; make room or copy the tars elsewhere") from error
    return load_manifest(folder)


def _npy(records: Records) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    return buffer.getvalue()
