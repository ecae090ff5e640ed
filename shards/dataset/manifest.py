"""The manifest of a data set: its shards, index, categories and their digests.

A data set is a folder:

    manifest.json           this module's Manifest
    source.json             the COCO JSON without its images and annotations (info, licenses, categories unchanged)
    corrections.json        the corrections of labels that were applied, if any
    index/images.npy        one record per image (IMAGE_DTYPE)
    index/annotations.npy   one record per annotation (ANNOTATION_DTYPE), grouped by image
    shard-000000.tar ...    WebDataset shards

Inside the project a category is a *label*: 0..K-1 in ascending order of the original category ids, so labels are
contiguous where the original DETR leaves holes. Every other id is the original one.
"""

import functools
import hashlib
import os
from typing import cast

import msgspec
import numpy as np

from shards.arrays import Records
from shards.config import CacheConfig
from shards.dataset.categories import Category
from shards.dataset.index import ANNOTATION_DTYPE, IMAGE_DTYPE, Index, find_inconsistency
from shards.dataset.listed_files import File, load_listed, read_listed
from shards.errors import OtherFormatError, ShardError
from shards.store import storage
from shards.store.cache import cache_for

FORMAT = 2
MANIFEST_NAME = "manifest.json"
SOURCE_NAME = "source.json"
CORRECTIONS_NAME = "corrections.json"
IMAGES_NAME = "index/images.npy"
ANNOTATIONS_NAME = "index/annotations.npy"


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tar: its name in the data set's folder (no path), number of samples, bytes and sha256 of the file."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, dict=True):
    """A data set: the content of its manifest, and how to reach its files.

    `source_digest` is the sha256 of the JSON file, with corrections that of both digests. `corrections_digest` is the
    sha256 of the corrections and `uncorrected_digest` that of the JSON file alone, both empty without corrections.
    `url` is the folder that it was loaded from, and `cache` configures the cache of its files. Neither is in the file or
    the digest: they are fields so that this one value, pickled to a worker, is enough to read samples there.
    """

    format: int
    name: str
    source_digest: str
    samples_per_shard: int
    images: int
    annotations: int
    categories: tuple[Category, ...]
    files: tuple[File, ...]
    shards: tuple[Shard, ...]
    corrections_digest: str = ""
    uncorrected_digest: str = ""
    url: str = ""
    cache: CacheConfig = CacheConfig()

    @functools.cached_property
    def digest(self) -> str:
        """Sha256 of the canonical JSON: equal exactly when categories, index and every shard's bytes are equal."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def annotations_digest(self) -> str:
        """Sha256 of the annotations that the data set was made from; with older corrections, that of both."""
        return self.uncorrected_digest or self.source_digest

    @property
    def panoptic(self) -> bool:
        """True if the annotations are segments of a PNG, and every category is a thing or stuff."""
        return self.categories[0].isthing is not None

    @property
    def num_classes(self) -> int:
        """Number of categories, K; labels are 0..K-1."""
        return len(self.categories)

    def to_json(self) -> bytes:
        """Return the canonical JSON, without `url` and `cache`."""
        return msgspec.json.encode(msgspec.structs.replace(self, url="", cache=CacheConfig()))

    def index(self) -> Index:
        """Return the index of this data set, loaded and checked against its digests once per process."""
        return self._index

    @functools.cached_property
    def _index(self) -> Index:
        return _index_of(self)  # its key is a hash of all shards, so it is looked up once per manifest


def load_manifest(url: str | os.PathLike[str], cache: CacheConfig | None = None) -> Manifest:
    """Read the manifest of the data set in the folder `url` (a path, or a URL that fsspec knows).

    A path is made absolute, so that the manifest is valid in another working directory as well. Index and shards are
    then read through `cache`; by default, remote ones are kept in a folder of this node.

    Raise `ShardError` when there is no manifest, or a field is unknown, missing or of another type (naming its path),
    and `OSError`, naming the address, when a retry may help.
    """
    url = storage.absolute(os.fspath(url)).removesuffix("/" + MANIFEST_NAME)
    path = storage.join(url, MANIFEST_NAME)
    try:
        with storage.error_context(path):
            content = _read_manifest(path)
    except FileNotFoundError:
        raise ShardError(
            f"{url}: no {MANIFEST_NAME} here; expected the folder of a data set: make one with `detr shard coco`"
        ) from None
    return msgspec.structs.replace(_parse(content, path), url=url, cache=cache or CacheConfig())


def load_index(manifest: Manifest) -> Index:
    """Map the index into memory (a remote one is read completely) and check it against the manifest and its digests.

    Raise `ShardError` naming the file that is missing, differs or contradicts the manifest, and `OSError` as
    `load_manifest` does.
    """
    images = _load_records(manifest, IMAGES_NAME, IMAGE_DTYPE, manifest.images)
    annotations = _load_records(manifest, ANNOTATIONS_NAME, ANNOTATION_DTYPE, manifest.annotations)
    index = Index(images=images, annotations=annotations, learns_crowds=manifest.panoptic)
    shards = manifest.shards
    problem = find_inconsistency(
        index, [shard.samples for shard in shards], [shard.bytes for shard in shards], manifest.num_classes
    )
    if problem is not None:
        raise ShardError(
            f"{storage.join(manifest.url, 'index')}: contradicts the manifest: {problem}; write the data set again"
        )
    return index


def check_file(manifest: Manifest, name: str) -> str | None:
    """Return the problem of one of `manifest.files` in one line, or None."""
    try:
        read_listed(storage.join(manifest.url, name), _listed(manifest, name))
    except (ShardError, OSError) as error:
        return str(error)
    return None


def _listed(manifest: Manifest, name: str) -> File:
    for file in manifest.files:
        if file.name == name:
            return file
    raise ShardError(f"{storage.join(manifest.url, MANIFEST_NAME)}: {name} is not listed; write the data set again")


def _load_records(manifest: Manifest, name: str, dtype: np.dtype[np.void], count: int) -> Records:
    url = storage.join(manifest.url, name)
    records = load_listed(url, _listed(manifest, name), cache_for(manifest.url, manifest.cache))
    if records.dtype != dtype or records.shape != (count,):
        raise ShardError(
            f"{url}: got {records.shape} records of {records.dtype}, expected {count} of {dtype}; "
            "write the data set again with this version"
        )
    return cast(Records, records)


@functools.lru_cache(maxsize=16)
def _index_of(manifest: Manifest) -> Index:
    return load_index(manifest)


def _read_manifest(path: str) -> bytes:
    try:
        return storage.read(path)
    except NotADirectoryError as error:  # the address is that of a file
        raise FileNotFoundError(path) from error


class _Version(msgspec.Struct):
    format: int


def _parse(content: bytes, path: str) -> Manifest:
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != FORMAT:
            raise OtherFormatError(
                f"{path}: got format {version}, expected {FORMAT}: write the data set again with this version"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except msgspec.DecodeError as error:
        raise ShardError(f"{path}: {error}; expected a manifest as written by `detr shard coco`") from None
    problem = _inconsistency(manifest)
    if problem is not None:
        raise ShardError(f"{path}: {problem}; expected a manifest as written by `detr shard coco`")
    return manifest


def _inconsistency(manifest: Manifest) -> str | None:
    ids = [category.id for category in manifest.categories]
    names = [shard.name for shard in manifest.shards] + [file.name for file in manifest.files]
    if manifest.url or manifest.cache != CacheConfig():
        return "the file must not contain its own url or cache"
    if ids != sorted(set(ids)) or not ids:
        return f"category ids are not ascending and distinct: {ids[:8]}"
    if len({category.isthing is None for category in manifest.categories}) > 1:
        return "only some categories are things or stuff"
    if manifest.images < 1 or manifest.annotations < 0 or manifest.samples_per_shard < 1:
        return f"impossible counts: {manifest.images} images, {manifest.annotations} annotations"
    if sum(shard.samples for shard in manifest.shards) != manifest.images:
        return f"the shards hold {sum(shard.samples for shard in manifest.shards)} samples, not {manifest.images}"
    if any(shard.samples < 0 or shard.bytes < 0 for shard in manifest.shards):
        return "a shard has a negative number of samples or bytes"
    # A manifest may come from someone else: it must not name files outside its own folder.
    outside = [name for name in names if name.startswith("/") or ".." in name.split("/") or "://" in name]
    if outside:
        return f"file names leave the data set's folder: {outside[0]!r}"
    # The cache stores shards by their names.
    nested = [shard.name for shard in manifest.shards if "/" in shard.name or not shard.name.strip(".")]
    return f"shards have names that are not plain file names: {nested[0]!r}" if nested else None
