"""Indexing of WebDataset tars that were written elsewhere, which makes them a data set without changing them.

`manifest.json`, `source.json` and `index/` are written beside the tars, the manifest last. Rows are in the order of the
tars' names and of the samples in them, so that tars of this project's writer get back the index that they had.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from shards.arrays import Ints
from shards.config import IndexConfig, WriteConfig
from shards.dataset.categories import Category, categories_from_names, parse_categories, read_categories
from shards.dataset.index import npy
from shards.dataset.listed_files import File
from shards.dataset.manifest import (
    ANNOTATIONS_NAME,
    FORMAT,
    IMAGES_NAME,
    MANIFEST_NAME,
    SOURCE_NAME,
    Manifest,
    Shard,
    load_manifest,
)
from shards.errors import ShardError
from shards.foreign.index_records import gather, image_ids, records, samples_of
from shards.foreign.tar_samples import ForeignTar, read_tar
from shards.source.defects import SourceError, printable
from shards.source.json_file import without_entries
from shards.source.report import REPORT_NAME, DefectReport, make_report, parse_report
from shards.store import storage
from shards.workers import Progress, thread_map


@dataclass(frozen=True)
class _Origin:
    """Categories of the data set, the content of its `source.json`, its name and the digest of its source."""

    categories: tuple[Category, ...]
    source: bytes
    name: str
    digest: str


def index_tars(
    url: str | os.PathLike[str], config: IndexConfig | None = None, progress: Progress | None = None
) -> Manifest:
    """Index the tars in the folder or URL `url` and write their manifest beside them; `progress` counts tars.

    Each tar of a URL is downloaded once. Return the manifest. Raise `ShardError` if there are no tars, if they already
    are a data set or if `url` cannot be written, and `SourceError` for unusable samples, which `URL.report.json` lists.
    """
    config = config or IndexConfig()
    url = storage.absolute(os.fspath(url))
    names = _tars(url)
    tars = thread_map(lambda name: _read(url, name, not config.without_annotations), names, config.workers, progress)
    ids = image_ids(tars)
    origin = _origin(url, config, tars, ids)
    index = gather(tars, ids, origin.categories)
    shards, images, annotations = records(index, [tar.shard for tar in tars])
    listed = sum(tar.shard.samples for tar in tars), len(index.annotations)
    rejected = [defect for defect in index.defects if defect.rejected]
    report_url = f"{url}.{REPORT_NAME}"
    failed = not shards or bool(rejected and config.on_defect == "fail")
    written = (0, 0) if failed else (len(images), len(annotations))
    report = make_report(config.on_defect, index.defects, listed, written)
    contents = {SOURCE_NAME: origin.source, IMAGES_NAME: npy(images), ANNOTATIONS_NAME: npy(annotations)}
    try:
        if failed:
            storage.write(report_url, report.to_json())
            raise SourceError(url, [defect for defect in report.defects if defect.rejected], report_url)
        _write(url, origin, shards, contents, written)
        if not _is_reported(url, report):
            storage.write(storage.join(url, REPORT_NAME), report.to_json())
        storage.remove(report_url)  # of an earlier run that failed
    except OSError as error:
        raise ShardError(
            f"{url}: cannot be written: {error}; expected to write an index beside the tars, because a manifest can only "
            "name tars beside it: free some space, or copy or link the tars to a folder that can be written"
        ) from error
    return load_manifest(url)


def _is_reported(url: str, report: DefectReport) -> bool:
    """Return true if the writer's own report of these samples exists; it is kept, because it also covers the source."""
    path = storage.join(url, REPORT_NAME)
    try:
        existing = parse_report(storage.read(path), path)
    except (FileNotFoundError, ShardError):
        return False
    same = (existing.images, existing.annotations) == (report.images, report.annotations)
    return same and not any(defect.rejected for defect in report.defects)


def _tars(url: str) -> list[str]:
    """Return the names of the tars in alphabetical order; raise `ShardError` if they cannot be indexed."""
    folder = storage.local_path(url)
    if folder is not None and not folder.is_dir():
        raise ShardError(f"{url}: no such folder; expected one with WebDataset tars: check it for a typo")
    files = sorted(name for name in storage.listing(url) if "/" not in name)
    if MANIFEST_NAME in files:
        raise ShardError(f"{url}: is a data set already; delete its {MANIFEST_NAME} to index the tars again")
    tars = [name for name in files if name.endswith(".tar")]
    if not tars:
        compressed = [name for name in files if ".tar." in name or name.endswith(".tgz")]
        found = f"only compressed ones, such as {compressed[0]}: unpack them to plain tars" if compressed else "none"
        raise ShardError(f"{url}: expected WebDataset tars (*.tar), found {found}")
    for name in tars:
        if printable(name) != name:
            raise ShardError(
                f"{url}: the name of {printable(name)} is not UTF-8, which a manifest cannot hold: rename it"
            )
    return tars


def _read(url: str, name: str, annotated: bool) -> ForeignTar:
    """Read one tar, from a temporary copy if it is remote."""
    path = storage.join(url, name)
    local = storage.local_path(path)
    if local is not None:
        return read_tar(local, name, annotated)
    with tempfile.NamedTemporaryFile(prefix="detr-tar-") as copy:
        storage.download(path, Path(copy.name))
        return read_tar(Path(copy.name), name, annotated)


class _Identity(msgspec.Struct):
    id: int


class _Listed(msgspec.Struct):
    images: list[_Identity]
    annotations: list[_Identity]


def _origin(url: str, config: IndexConfig, tars: Sequence[ForeignTar], ids: Ints) -> _Origin:
    """Return the origin of the tars from the file of categories, else from `source.json`, else from the tars alone."""
    digest = hashlib.sha256("".join(tar.shard.sha256 for tar in tars).encode()).hexdigest()
    name = printable(config.name or url.rpartition("/")[2])
    objects = [entry for sample in samples_of(tars) for entry in sample.objects]
    if config.categories is not None:
        return _origin_in_file(config.categories, config, _Origin((), b"", name, digest), ids, len(objects))
    source = _beside(url)
    if source is not None:
        return _Origin(parse_categories(storage.join(url, SOURCE_NAME), source, 1), source, name, digest)
    kinds = {entry.kind for entry in objects}
    names = sorted(kind for kind in kinds if isinstance(kind, str))
    if not names or any(isinstance(kind, int) for kind in kinds):
        raise ShardError(
            f"{url}: the tars do not name their categories; expected --categories FILE (a COCO JSON or names)"
        )
    categories = categories_from_names(names, 1)
    return _Origin(categories, _source(categories), name, digest)


def _origin_in_file(path: Path, config: IndexConfig, default: _Origin, ids: Ints, annotations: int) -> _Origin:
    """Return the origin in the file of categories `path`.

    Name and digest are those of `default`, unless the file is the COCO JSON that the tars were made from, which has
    their image `ids` and number of `annotations`.
    """
    categories = read_categories(path, 1)
    content = path.read_bytes()
    try:
        top = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # a list of names
        return replace(default, categories=categories, source=_source(categories))
    origin = replace(default, categories=categories, source=without_entries(top))
    try:
        listed = msgspec.json.decode(content, type=_Listed)
    except (msgspec.ValidationError, RecursionError):
        return origin
    if {image.id for image in listed.images} != set(ids.tolist()) or len(listed.annotations) != annotations:
        return origin
    return replace(origin, name=printable(config.name or path.stem), digest=hashlib.sha256(content).hexdigest())


def _beside(url: str) -> bytes | None:
    """Return the content of `source.json` beside the tars, or None."""
    try:
        return storage.read(storage.join(url, SOURCE_NAME))
    except FileNotFoundError:
        return None


def _source(categories: Sequence[Category]) -> bytes:
    """Return the content of a `source.json` with only categories."""
    return msgspec.json.encode({"categories": categories})


def _write(
    url: str, origin: _Origin, shards: Sequence[Shard], contents: dict[str, bytes], written: tuple[int, int]
) -> None:
    """Write the index, then the manifest."""
    counts = [shard.samples for shard in shards]
    # Unknown, so take the size that gives these shards, if all but the last are of the same size.
    even = len(counts) > 1 and len(set(counts[:-1])) == 1
    samples_per_shard = counts[0] if even else max([WriteConfig.samples_per_shard, *counts])
    manifest = Manifest(
        format=FORMAT,
        name=origin.name,
        source_digest=origin.digest,
        samples_per_shard=samples_per_shard,
        images=written[0],
        annotations=written[1],
        categories=origin.categories,
        files=tuple(
            File(name, len(content), hashlib.sha256(content).hexdigest()) for name, content in contents.items()
        ),
        shards=tuple(shards),
    )
    for name, content in contents.items():
        storage.write(storage.join(url, name), content)
    folder = storage.local_path(url)
    if folder is not None:
        storage.sync_folder((folder / IMAGES_NAME).parent)
    storage.write(storage.join(url, MANIFEST_NAME), msgspec.json.format(manifest.to_json(), indent=2) + b"\n")
    if folder is not None:
        storage.sync_folder(folder)
