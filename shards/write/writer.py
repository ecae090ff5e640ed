"""Write a COCO data set as reproducible WebDataset tars with an index and a manifest.

A data set is complete or absent: everything is written to another folder, flushed and renamed; at a URL, the manifest
is written last. The bytes are a function of the input alone: images are ordered by a hash of their id, tar headers are
fixed, and each worker writes whole shards. A stopped run leaves its finished shards, and the same command continues
from them.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from shards.arrays import Ints
from shards.config import WriteConfig
from shards.dataset.index import npy
from shards.dataset.listed_files import File
from shards.dataset.manifest import (
    ANNOTATIONS_NAME,
    CORRECTIONS_NAME,
    FORMAT,
    IMAGES_NAME,
    MANIFEST_NAME,
    SOURCE_NAME,
    Manifest,
    load_manifest,
)
from shards.errors import ShardError
from shards.hashing import hashes
from shards.masks.parse import has_segmentations
from shards.source.checks import MAX_IMAGE_ID
from shards.source.coco import Source, read_source
from shards.source.corrections import read_corrections
from shards.source.defects import Defect, SourceError, Unconvertible, printable
from shards.source.panoptic import read_panoptic_source
from shards.source.panoptic_checks import drop_notes_without_pixels
from shards.source.report import REPORT_NAME, drop_mismeasured, make_report
from shards.store import storage
from shards.workers import Progress, process_map
from shards.write.existing import check_same, existing_data_set
from shards.write.index_records import annotation_records, image_records
from shards.write.shard import ShardJob, ShardResult, SourceSample, write_shard
from shards.write.staging import Stage, staging

# Applies a function to many shard jobs and returns the results in their order; function, jobs and results are picklable.
Map = Callable[[Callable[[ShardJob], ShardResult], Iterable[ShardJob]], Iterable[ShardResult]]


def write_coco(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: WriteConfig | None = None,
    progress: Progress | None = None,
    map: Map | None = None,
    lost: Unconvertible | None = None,
    corrections: str | os.PathLike[str] | None = None,
) -> Manifest:
    """Write a COCO data set (image folder or URL, JSON file) to the new folder or URL `out` and return its manifest.

    If `out` already holds exactly this data set, it is left unchanged. `map` runs the shard jobs elsewhere instead of
    in `config.workers` processes; images and `out` must be visible from there. `lost` is counted and reported with the
    entries of the JSON. `corrections` is a file of reviewed corrections of labels, see `shards.source.corrections`; it is
    kept in the data set.

    Raise `ShardError` when an input is missing or not COCO, or `out` is not free or cannot be written; `SourceError`
    with all defects when images or annotations are defective and `config.on_defect` is `fail`: then only
    `OUT.report.json` is written.
    """
    config = config or WriteConfig()
    reviewed = None if corrections is None else read_corrections(Path(corrections))
    source = read_source(images, annotations, config.limit, reviewed)
    if lost is not None:
        source = _with_lost(source, lost)
    return _write(source, out, config, progress, map)


def write_panoptic(
    images: str | os.PathLike[str],
    annotations: str | os.PathLike[str],
    segments: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: WriteConfig | None = None,
    progress: Progress | None = None,
    map: Map | None = None,
) -> Manifest:
    """Write a data set in COCO's panoptic format, with its folder or URL `segments` of PNGs, as `write_coco` does."""
    config = config or WriteConfig()
    source = read_panoptic_source(images, annotations, segments, config.limit)
    return _write(source, out, config, progress, map)


def _write(
    source: Source, out: str | os.PathLike[str], config: WriteConfig, progress: Progress | None, map: Map | None
) -> Manifest:
    out = storage.absolute(os.fspath(out))
    name = printable(config.name or source.path.stem)
    if source.limited:
        name = f"{name}-first-{config.limit}"
    existing = existing_data_set(out)
    if existing is not None:
        check_same(existing, source, name, config.samples_per_shard, config.on_defect)
        return existing
    report_url = f"{out}.{REPORT_NAME}"
    try:
        with staging(out, _key(source, config, name)) as stage:
            written = list(_write_shards(source, stage, config, progress, map))
            defects = drop_mismeasured([*source.defects, *(defect for result in written for defect in result.defects)])
            defects = drop_notes_without_pixels(defects)
            if not any(result.members for result in written) or (
                config.on_defect == "fail" and any(defect.rejected for defect in defects)
            ):
                report = make_report(config.on_defect, defects, source.listed, (0, 0))
                storage.write(report_url, report.to_json())
                rejected = [defect for defect in report.defects if defect.rejected]
                # An image takes its annotations with it, so images come first.
                rejected.sort(key=lambda defect: defect.annotation_id is not None)
                raise SourceError(source.path, rejected, report_url)
            _write_rest(source, written, defects, stage, config, name)
        storage.remove(report_url)  # of an earlier run that failed
    except OSError as error:
        no_bucket = isinstance(error, FileNotFoundError) and storage.local_path(out) is None
        remedy = "make the bucket first, or correct the address" if no_bucket else "free space or choose another folder"
        raise ShardError(f"{out}: cannot be written: {error}; {remedy}") from error
    return load_manifest(out)


def _with_lost(source: Source, lost: Unconvertible) -> Source:
    listed = source.listed[0] + lost.images, source.listed[1] + lost.annotations
    last = int(source.images.ids.max(initial=0)) if source.limited else MAX_IMAGE_ID
    defects = (defect for defect in lost.defects if defect.image_id is None or defect.image_id <= last)
    return replace(source, listed=listed, defects=(*defects, *source.defects))


def _order(source: Source) -> Ints:
    """Return image rows by a hash of their id, so that every shard is a fair sample whatever the order of the JSON."""
    ids = source.images.ids
    return np.lexsort((ids, hashes((), ids)))


def _key(source: Source, config: WriteConfig, name: str) -> str:
    identity = (FORMAT, source.digest, config.samples_per_shard, name, config.on_defect)  # the name includes a limit
    return hashlib.sha256(msgspec.json.encode(identity)).hexdigest()


def _jobs(source: Source, config: WriteConfig) -> Iterator[ShardJob]:
    order = _order(source).tolist()
    quarantine = config.on_defect == "quarantine"
    write = quarantine or not any(defect.rejected for defect in source.defects)
    texts = source.annotations.texts
    masks = source.segments is None and has_segmentations(texts)
    png_folder = "" if source.segments is None else source.segments.folder
    for number, start in enumerate(range(0, len(order), config.samples_per_shard)):
        samples = []
        for row in order[start : start + config.samples_per_shard]:
            first, count = int(source.first[row]), int(source.count[row])
            annotations = [bytes(texts[position]) for position in source.rows[first : first + count].tolist()]
            png = "" if source.segments is None else source.segments.names[row]
            samples.append(SourceSample(source.image(row), bytes(source.images.texts[row]), annotations, png))
        yield ShardJob(f"shard-{number:06d}.tar", source.folder, samples, write, quarantine, masks, png_folder)


def _write_shards(
    source: Source, stage: Stage, config: WriteConfig, progress: Progress | None, map: Map | None
) -> Iterator[ShardResult]:
    total, count = len(source.images), 0

    def report(done: int) -> None:
        nonlocal count
        if done > count and progress is not None:
            progress(done, total)
        count = max(done, count)

    jobs = _jobs(source, config)
    if map is not None:
        for written in map(functools.partial(write_shard, stage=stage, done=_ignore), jobs):
            report(count + len(written.read))
            yield written
    elif config.workers:
        yield from process_map(functools.partial(_write_shard, stage), jobs, config.workers, report)
    else:
        for job in jobs:
            yield write_shard(job, stage, lambda done: report(count + done))


def _write_shard(stage: Stage, job: ShardJob, done: Callable[[int], None]) -> ShardResult:
    return write_shard(job, stage, done)


def _ignore(_: int) -> None:
    """Progress of a shard job elsewhere, which is counted when it ends."""


def _write_rest(
    source: Source, written: list[ShardResult], defects: list[Defect], stage: Stage, config: WriteConfig, name: str
) -> None:
    """Write the index, the report and, last, the manifest."""
    images, rows = image_records(source, written)
    annotations = annotation_records(source, rows, written)
    report = make_report(config.on_defect, defects, source.listed, (len(images), len(annotations)))
    contents = {
        SOURCE_NAME: source.rest,
        IMAGES_NAME: npy(images),
        ANNOTATIONS_NAME: npy(annotations),
    }
    if source.corrections is not None:
        contents[CORRECTIONS_NAME] = source.corrections.content
    shards = tuple(result.shard for result in written if result.shard is not None)
    _check_there(stage, {shard.name: shard.bytes for shard in shards})
    for file_name, content in contents.items():
        stage.write(file_name, content)
    # Not in the manifest: messages of another decoder version must not change the data set's digest.
    stage.write(REPORT_NAME, report.to_json())
    manifest = Manifest(
        format=FORMAT,
        name=name,
        source_digest=source.digest,
        samples_per_shard=config.samples_per_shard,
        images=len(images),
        annotations=len(annotations),
        categories=source.categories,
        files=tuple(
            File(file_name, len(content), hashlib.sha256(content).hexdigest())
            for file_name, content in contents.items()
        ),
        shards=shards,
        corrections_digest="" if source.corrections is None else source.corrections.digest,
        uncorrected_digest="" if source.corrections is None else source.json_digest,
    )
    stage.write(MANIFEST_NAME, msgspec.json.format(manifest.to_json(), indent=2) + b"\n")


def _check_there(stage: Stage, shards: dict[str, int]) -> None:
    """Raise `ShardError` when shards that workers reported as written are not visible to this process."""
    present = storage.listing(stage.url)
    absent = [name for name, length in shards.items() if present.get(name) != length]
    if absent:
        raise ShardError(
            f"{stage.url}: {len(absent)} shards that workers wrote are not visible here, such as {absent[0]}; expected "
            "--out to be visible from every process and node: give a shared folder or a URL"
        )
