"""A COCO data set into reproducible WebDataset tars with an index and a manifest.

Everything is written into ``OUT.partial``, flushed to the disk and renamed to OUT at the end, so a data set is whole or
absent. The bytes are a function of the input alone: images are ordered by a hash of their id, tar headers are fixed,
and workers take whole shards. An interrupted run leaves its finished shards in ``OUT.partial``, and the same command
goes on from there.
"""

import hashlib
import io
import itertools
import os
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shards import storage
from shards.errors import ShardError
from shards.manifest import (
    ANNOTATION_DTYPE,
    ANNOTATIONS_NAME,
    FORMAT,
    IMAGE_DTYPE,
    IMAGES_NAME,
    MANIFEST_NAME,
    SOURCE_NAME,
    File,
    Manifest,
    Shard,
    load_manifest,
)
from shards.plan import hashes
from shards.source import Defect, ImageEntry, Source, SourceError, read_image, read_source
from shards.staging import publish, staging
from shards.tars import SEGMENTATIONS, TarMember, file_digest, image_members, sample_key, scan_tar, text_members

# (images done, images in all); called from whichever thread finished one, never from two at once.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WriteConfig:
    """How to write a data set.

    Attributes:
        samples_per_shard: images per tar (1,000 of COCO are about 160 MB).
        workers: threads, each writing whole shards; 0 writes in the calling thread. It never changes the result.
        name: name of the data set; the annotation file's name without its ending where None.
        limit: write only so many images, those of lowest id; 0 for all. The data set's name then says so.
    """

    samples_per_shard: int = 1000
    workers: int = 0
    name: str | None = None
    limit: int = 0

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or self.workers < 0 or self.limit < 0:
            raise ShardError(
                f"got samples_per_shard {self.samples_per_shard}, workers {self.workers} and limit {self.limit}, "
                "expected at least 1, 0 and 0"
            )


@dataclass(frozen=True)
class _Written:
    shard: Shard
    members: tuple[TarMember, ...]  # the encoded image of each sample
    texts: dict[str, TarMember]  # the segmentations of each sample that has some


def write_coco(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: WriteConfig | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write the COCO data set (image folder, JSON file) as a data set in the new folder ``out``.

    Where ``out`` already holds exactly this data set, it is left as it is.

    Raises:
        ShardError: an input is absent or not COCO, or ``out`` is not a free local folder.
        SourceError: images or annotations are defective (all are collected); nothing is left behind.
    """
    config = config or WriteConfig()
    folder = _local(out)
    source = read_source(images, annotations)
    name = config.name or source.path.stem
    if config.limit and config.limit < len(source.images):
        source = replace(source, images=sorted(source.images, key=lambda entry: entry.id)[: config.limit])
        name = f"{name}-first-{config.limit}"
    finished = _finished(folder, source, config, name)
    if finished is not None:
        return finished
    try:
        with staging(folder, _key(source, config, name)) as aside:
            written = _write_shards(source, aside, config, progress)
            _write_rest(source, written, aside, config, name)
            publish(aside, folder)
    except OSError as error:
        raise ShardError(f"{folder}: cannot be written: {error}; make room or choose another folder") from error
    return load_manifest(folder)


def shard_rows(images: int, samples_per_shard: int) -> list[range]:
    """The rows of each shard."""
    starts = range(0, images, samples_per_shard)
    return [range(start, min(start + samples_per_shard, images)) for start in starts]


def _local(out: str | os.PathLike[str]) -> Path:
    path = storage.local_path(os.fspath(out))
    if path is None:
        raise ShardError(f"{out}: is a remote URL, expected a local folder: write there and copy the folder as it is")
    return path.absolute()


def _ordered(source: Source) -> list[ImageEntry]:
    """Images by a hash of their id, so that every shard is a fair sample, whatever the order of the JSON."""
    ids = np.array([entry.id for entry in source.images], np.int64)
    order = np.lexsort((ids, hashes((), ids)))
    return [source.images[position] for position in order]


def _key(source: Source, config: WriteConfig, name: str) -> str:
    parts = (FORMAT, source.digest, config.samples_per_shard, name)  # the name tells a limit
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _finished(folder: Path, source: Source, config: WriteConfig, name: str) -> Manifest | None:
    """The data set in ``folder`` where it is the one asked for; None where the folder is free."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ShardError(f"{folder}: is a file, expected a new or empty folder: choose another one")
    if not (folder / MANIFEST_NAME).exists():
        if any(folder.iterdir()):
            raise ShardError(f"{folder}: is not empty and holds no data set, expected a new or empty folder")
        return None
    manifest = load_manifest(folder)
    found = (manifest.source_digest, manifest.samples_per_shard, manifest.name)
    shards_whole = all(
        (folder / shard.name).is_file() and (folder / shard.name).stat().st_size == shard.bytes
        for shard in manifest.shards
    )
    lengths = [(source.folder / entry.file_name).stat().st_size for entry in _ordered(source)]
    same = found == (source.digest, config.samples_per_shard, name) and shards_whole
    if same and manifest.index().images["length"].tolist() == lengths:
        return manifest
    raise ShardError(
        f"{folder}: already holds another data set ({manifest.name}, {manifest.images} images, digest "
        f"{manifest.digest[:12]}), expected a new or empty folder: choose another one or delete it first"
    )


def _write_shards(source: Source, folder: Path, config: WriteConfig, progress: Progress | None) -> list[_Written]:
    entries = _ordered(source)
    parts = [
        (folder / f"shard-{number:06d}.tar", entries[rows.start : rows.stop])
        for number, rows in enumerate(shard_rows(len(entries), config.samples_per_shard))
    ]
    count, lock, defects = itertools.count(1), threading.Lock(), list[Defect]()

    def done() -> None:
        with lock:
            number = next(count)
            if progress is not None:
                progress(number, len(entries))

    def one(part: tuple[Path, list[ImageEntry]]) -> _Written | None:
        return _write_shard(source, *part, defects, done)

    if config.workers == 0:
        results = [one(part) for part in parts]
    else:
        # Threads: reading, decoding, hashing and writing all release the interpreter's lock.
        executor = ThreadPoolExecutor(config.workers, thread_name_prefix="write_coco")
        try:
            results = list(executor.map(one, parts))
        finally:
            executor.shutdown(cancel_futures=True)
    if defects:
        raise SourceError(source.path, sorted(defects, key=lambda defect: defect.text))
    return [result for result in results if result is not None]


def _write_shard(
    source: Source, path: Path, entries: list[ImageEntry], defects: list[Defect], done: Callable[[], None]
) -> _Written | None:
    """Write one shard, or take the finished one of an interrupted run; None where the source has defects."""
    # Imported here because webdataset imports torch, which readers of this module may not need.
    from webdataset.writer import TarWriter

    written = _reusable(source, path, entries)
    if written is not None:
        for _ in entries:
            done()
        return written
    aside = path.with_name(path.name + ".tmp")
    with aside.open("wb") as file:
        with TarWriter(file, encoder=False, mtime=0, user="root", group="root", mode=0o444) as tar:
            for entry in entries:
                image = read_image(source, entry)
                if isinstance(image, Defect):
                    defects.append(image)
                elif not defects:
                    tar.write(_sample(entry, *image))
                done()
        file.flush()
        os.fsync(file.fileno())
    if defects:
        return None
    aside.rename(path)
    return _describe(path)


def _reusable(source: Source, path: Path, entries: list[ImageEntry]) -> _Written | None:
    if not path.exists():
        return None
    try:
        written = _describe(path)
    except ShardError:
        return None
    found = [(member.key, member.crc32) for member in written.members]
    expected = [(sample_key(entry.id), zlib.crc32((source.folder / entry.file_name).read_bytes())) for entry in entries]
    return written if found == expected else None


def _describe(path: Path) -> _Written:
    members = scan_tar(path)
    images = image_members(members)
    shard = Shard(path.name, len(images), path.stat().st_size, file_digest(path))
    return _Written(shard, images, text_members(members))


def _sample(entry: ImageEntry, content: bytes, extension: str) -> dict[str, Any]:
    """A WebDataset sample. Segmentations go apart: they are most of the text and detection never reads them."""
    annotations = [msgspec.json.decode(annotation.raw) for annotation in entry.annotations]
    segmentations = [annotation.pop("segmentation", None) for annotation in annotations]
    sample = {
        "__key__": sample_key(entry.id),
        extension: content,
        "json": msgspec.json.encode({"image": entry.raw, "annotations": annotations}),
    }
    if any(segmentation is not None for segmentation in segmentations):
        sample[SEGMENTATIONS[1:]] = msgspec.json.encode(segmentations)
    return sample


def _write_rest(source: Source, written: list[_Written], folder: Path, config: WriteConfig, name: str) -> None:
    """The index, and last of all the manifest."""
    entries = _ordered(source)
    contents = {
        SOURCE_NAME: source.rest,
        IMAGES_NAME: _npy(_image_records(entries, written)),
        ANNOTATIONS_NAME: _npy(_annotation_records(entries, source)),
    }
    (folder / IMAGES_NAME).parent.mkdir(exist_ok=True)
    for file_name, content in contents.items():
        storage.write_atomic(folder / file_name, content)
    storage.sync_folder((folder / IMAGES_NAME).parent)
    manifest = Manifest(
        format=FORMAT,
        name=name,
        source_digest=source.digest,
        samples_per_shard=config.samples_per_shard,
        images=len(entries),
        annotations=sum(len(entry.annotations) for entry in entries),
        categories=source.categories,
        files=tuple(
            File(file_name, len(content), hashlib.sha256(content).hexdigest())
            for file_name, content in contents.items()
        ),
        shards=tuple(part.shard for part in written),
    )
    storage.write_atomic(folder / MANIFEST_NAME, msgspec.json.format(manifest.to_json(), indent=2) + b"\n")
    storage.sync_folder(folder)


def _image_records(entries: list[ImageEntry], written: list[_Written]) -> np.ndarray[Any, Any]:
    records = np.zeros(len(entries), IMAGE_DTYPE)
    members = [member for part in written for member in part.members]
    texts = [part.texts.get(member.key) for part in written for member in part.members]
    records["shard"] = [number for number, part in enumerate(written) for _ in part.members]
    for ours, theirs in (("image_id", "id"), ("width", "width"), ("height", "height")):
        records[ours] = [getattr(entry, theirs) for entry in entries]
    for field in ("offset", "length", "crc32"):
        records[field] = [getattr(member, field) for member in members]
        records[f"text_{field}"] = [0 if text is None else getattr(text, field) for text in texts]
    records["count"] = [len(entry.annotations) for entry in entries]
    records["first"] = np.cumsum(records["count"]) - records["count"]
    return records


def _annotation_records(entries: list[ImageEntry], source: Source) -> np.ndarray[Any, Any]:
    labels = {category.id: label for label, category in enumerate(source.categories)}
    return np.array(
        [
            (
                annotation.id,
                row,
                annotation.bbox_xywh,
                annotation.area,
                labels[annotation.category_id],
                annotation.iscrowd,
            )
            for row, entry in enumerate(entries)
            for annotation in entry.annotations
        ],
        ANNOTATION_DTYPE,
    )


def _npy(records: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, records, allow_pickle=False)
    return buffer.getvalue()
