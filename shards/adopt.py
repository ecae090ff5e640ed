"""Someone else's WebDataset tars as a data set: indexed where they lie, and not touched.

``manifest.json``, ``source.json`` and ``index/`` are written beside the tars, the manifest last. Rows are in the order of
the tars' names and of the samples in them, so that tars of this project's writer get back the very index they had.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shards import storage
from shards.categories import numbered, parse_categories, read_categories
from shards.config import IndexConfig, WriteConfig
from shards.defects import REPORT_NAME, DefectReport, SourceError, make_report, parse_report, printable
from shards.document import each
from shards.errors import ShardError
from shards.foreign import ForeignTar, read_tar
from shards.foreign_index import gather, image_ids, records, samples_of
from shards.index import Ints
from shards.listed import File
from shards.manifest import (
    ANNOTATIONS_NAME,
    FORMAT,
    IMAGES_NAME,
    MANIFEST_NAME,
    SOURCE_NAME,
    Category,
    Manifest,
    Shard,
    load_manifest,
)
from shards.records import npy
from shards.source import without_entries
from shards.write import Progress


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
    """Index the tars in the folder or URL ``url`` and write their manifest beside them; ``progress`` counts tars.

    Tars of a URL are fetched one by one, each once.

    Raises ShardError where there are no tars, where they are a data set already or where the place cannot be written,
    and SourceError with what is wrong with all their samples, which ``URL.report.json`` then holds as well.
    """
    config = config or IndexConfig()
    url = storage.absolute(os.fspath(url))
    names = _tars(url)
    tars = each(lambda name: _read(url, name, not config.without_annotations), names, config.workers, progress)
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
    contents = {SOURCE_NAME: origin.rest, IMAGES_NAME: npy(images), ANNOTATIONS_NAME: npy(annotations)}
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
            f"{url}: cannot be written: {error}; expected a place for an index beside the tars, as a manifest names no "
            "others: make room, or copy or link the tars to a folder that can be written"
        ) from error
    return load_manifest(url)


def _is_reported(url: str, report: DefectReport) -> bool:
    """Whether the writer's own report lies there, which says more: where these samples came from."""
    path = storage.join(url, REPORT_NAME)
    try:
        found = parse_report(storage.read(path), path)
    except (FileNotFoundError, ShardError):
        return False
    same = (found.images, found.annotations) == (report.images, report.annotations)
    return same and not any(defect.rejected for defect in report.defects)


def _tars(url: str) -> list[str]:
    """Names of the tars, in alphabetical order."""
    folder = storage.local_path(url)
    if folder is not None and not folder.is_dir():
        raise ShardError(f"{url}: no such folder; expected one with WebDataset tars: check it for a typo")
    found = sorted(name for name in storage.listing(url) if "/" not in name)
    if MANIFEST_NAME in found:
        raise ShardError(f"{url}: is a data set already; delete its {MANIFEST_NAME} to have the tars indexed again")
    tars = [name for name in found if name.endswith(".tar")]
    if not tars:
        packed = [name for name in found if ".tar." in name or name.endswith(".tgz")]
        said = f"only compressed ones, such as {packed[0]}: unpack them to plain tars" if packed else "none"
        raise ShardError(f"{url}: expected WebDataset tars (*.tar), found {said}")
    odd = [name for name in tars if printable(name) != name]
    if odd:
        raise ShardError(
            f"{url}: the name of {printable(odd[0])} is not UTF-8, which a manifest cannot hold: rename it"
        )
    return tars


def _read(url: str, name: str, annotated: bool) -> ForeignTar:
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
    digest = hashlib.sha256("".join(tar.shard.sha256 for tar in tars).encode()).hexdigest()
    name, objects = (
        printable(config.name or url.rpartition("/")[2]),
        [one for sample in samples_of(tars) for one in sample.objects],
    )
    beside = _beside(url)
    if config.categories is None and beside is None:
        kinds = {one.kind for one in objects}
        names = sorted(kind for kind in kinds if isinstance(kind, str))
        if not names or any(isinstance(kind, int) for kind in kinds):
            raise ShardError(
                f"{url}: the tars do not name their categories; expected --categories FILE (a COCO JSON or names)"
            )
        categories = numbered(names, 1)
        return _Origin(categories, _source(categories), name, digest)
    if config.categories is None and beside is not None:
        return _Origin(parse_categories(storage.join(url, SOURCE_NAME), beside, 1), beside, name, digest)
    path = Path(config.categories or SOURCE_NAME)
    categories = read_categories(path, 1)
    content = path.read_bytes()
    try:
        top = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # a list of names
        return _Origin(categories, _source(categories), name, digest)
    rest = without_entries(top)
    try:
        listed = msgspec.json.decode(content, type=_Listed)
    except (msgspec.ValidationError, RecursionError):
        return _Origin(categories, rest, name, digest)
    if {one.id for one in listed.images} == set(ids.tolist()) and len(listed.annotations) == len(objects):
        return _Origin(categories, rest, printable(config.name or path.stem), hashlib.sha256(content).hexdigest())
    return _Origin(categories, rest, name, digest)


def _beside(url: str) -> bytes | None:
    try:
        return storage.read(storage.join(url, SOURCE_NAME))
    except FileNotFoundError:
        return None


def _source(categories: Sequence[Category]) -> bytes:
    return msgspec.json.encode({"categories": categories})


def _write(
    url: str, origin: _Origin, shards: Sequence[Shard], contents: dict[str, bytes], written: tuple[int, int]
) -> None:
    """The index, and last of all the manifest."""
    counts = [shard.samples for shard in shards]
    even = len(counts) > 1 and len(set(counts[:-1])) == 1
    manifest = Manifest(
        format=FORMAT,
        name=origin.name,
        source_digest=origin.digest,
        # Not said by tars: as a writer of even shards would have had it.
        samples_per_shard=counts[0] if even else max([WriteConfig.samples_per_shard, *counts]),
        images=written[0],
        annotations=written[1],
        categories=origin.categories,
        files=tuple(File(name, len(one), hashlib.sha256(one).hexdigest()) for name, one in contents.items()),
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
