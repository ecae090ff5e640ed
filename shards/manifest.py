"""What a data set is: its shards, its index, its categories and their digests.

A data set is a folder::

    manifest.json           this module's Manifest
    source.json             the COCO JSON without its images and annotations (info, licenses, categories as they came)
    index/images.npy        one record per image (IMAGE_DTYPE)
    index/annotations.npy   one record per annotation (ANNOTATION_DTYPE), grouped by image
    shard-000000.tar ...    WebDataset shards

Inside the project a category is a *label*: 0..K-1 in ascending order of the original category ids. Every other id is
the original one. A *row* is an image's position in ``images.npy``.
"""

import functools
import hashlib
import io
import os
from dataclasses import dataclass
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt

from shards import storage
from shards.cache import CacheConfig, cache_for
from shards.errors import ShardError
from shards.fetch import Item
from shards.retry import StoreError

FORMAT = 2
MANIFEST_NAME = "manifest.json"
SOURCE_NAME = "source.json"
IMAGES_NAME = "index/images.npy"
ANNOTATIONS_NAME = "index/annotations.npy"

Ints = npt.NDArray[np.int64]
Records = npt.NDArray[np.void]

# `shard`, `offset`, `length`, `crc32`: where the encoded image lies, and its checksum; `text_*`: the same of the sample's
# segmentation.json (length 0 where it has none). `first`, `count`: its annotations. Sizes in pixels.
IMAGE_DTYPE = np.dtype(
    [
        ("image_id", "<i8"),
        ("shard", "<i4"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("width", "<i4"),
        ("height", "<i4"),
        ("first", "<i8"),
        ("count", "<i4"),
        ("crc32", "<u4"),
        ("text_offset", "<i8"),
        ("text_length", "<i4"),
        ("text_crc32", "<u4"),
    ]
)
# `image`: row in images.npy. `bbox`: x, y, width, height in pixels as in the COCO JSON (not clamped to the image).
ANNOTATION_DTYPE = np.dtype(
    [
        ("annotation_id", "<i8"),
        ("image", "<i4"),
        ("bbox", "<f8", (4,)),
        ("area", "<f8"),
        ("label", "<i4"),
        ("iscrowd", "u1"),
    ]
)


class Category(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A category: its original id and name. Its position in ``Manifest.categories`` is its label."""

    id: int
    name: str


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tar: its name in the data set's folder (no path), number of samples, bytes and sha256 of the file."""

    name: str
    samples: int
    bytes: int
    sha256: str


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file beside the shards: name, bytes and sha256."""

    name: str
    bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A data set. ``url`` says where it was found, ``cache`` where what was fetched from there is kept: both belong
    neither to the file nor to the digest."""

    format: int
    name: str
    source_digest: str
    samples_per_shard: int
    images: int
    annotations: int
    categories: tuple[Category, ...]
    files: tuple[File, ...]
    shards: tuple[Shard, ...]
    url: str = ""
    cache: CacheConfig = CacheConfig()

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON: equal exactly when categories, index and every shard's bytes are equal."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @property
    def num_classes(self) -> int:
        """K; labels are 0..K-1."""
        return len(self.categories)

    def to_json(self) -> bytes:
        """The canonical JSON, without ``url`` and ``cache``."""
        return msgspec.json.encode(msgspec.structs.replace(self, url="", cache=CacheConfig()))

    def index(self) -> "Index":
        """The index of this data set, loaded (and checked against its digests) once per process."""
        return _cached_index(self)


@dataclass(frozen=True, eq=False)
class Index:
    """The memory-mapped columns of a data set: read-only, and shared by every process of a machine.

    Attributes:
        images: IMAGE_DTYPE [images].
        annotations: ANNOTATION_DTYPE [annotations], those of row r at ``first[r] : first[r] + count[r]``.
    """

    images: Records
    annotations: Records

    @functools.cached_property
    def boxes_per_image(self) -> Ints:
        """int64 [images]: how many annotations of each image are not crowds."""
        rows = self.annotations["image"][self.annotations["iscrowd"] == 0]
        return np.bincount(rows, minlength=len(self.images)).astype(np.int64)

    @property
    def max_boxes(self) -> int:
        """The most non-crowd boxes in one image: a model needs at least as many queries."""
        return int(self.boxes_per_image.max(initial=0))

    def annotations_of(self, row: int) -> Records:
        """The annotation records of one image, crowds included, in the order of the COCO JSON."""
        record = self.images[row]
        first = int(record["first"])
        return self.annotations[first : first + int(record["count"])]

    def rows_of(self, image_ids: npt.ArrayLike) -> Ints:
        """Rows of original image ids, int64 of the same shape; raises ShardError naming an unknown id."""
        ids = np.asarray(image_ids, dtype=np.int64)
        order, known = self._by_id
        found = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        unknown = known[found] != ids
        if unknown.any():
            raise ShardError(
                f"image id {int(ids[unknown][0])} is not in this data set of {len(known)} images; expected ids of its "
                "own images: use the manifest that the ids come from"
            )
        return order[found]

    @functools.cached_property
    def _by_id(self) -> tuple[Ints, Ints]:
        ids = self.images["image_id"]
        order = np.argsort(ids, kind="stable")
        return order, ids[order]


def load_manifest(url: str | os.PathLike[str], cache: CacheConfig | None = None) -> Manifest:
    """Read the manifest of the data set in the folder ``url`` (a path, or a URL that fsspec knows).

    A path is kept as an absolute one, so that the manifest is good in another working directory as well. Index and
    shards are then read through ``cache``; by default, remote ones are kept in a folder of this node.

    Raises ShardError where there is none, and where a field is unknown, absent or mistyped (naming its path); OSError,
    naming the address, where trying again may mend it.
    """
    url = storage.absolute(os.fspath(url)).removesuffix("/" + MANIFEST_NAME)
    path = storage.join(url, MANIFEST_NAME)
    try:
        content = storage.read(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ShardError(
            f"{url}: no {MANIFEST_NAME} here; expected the folder of a data set: make one with `detr shard coco`"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    return msgspec.structs.replace(_parse(content, path), url=url, cache=cache or CacheConfig())


def load_index(manifest: Manifest) -> Index:
    """Map the index into memory (a remote one is read whole) and check it against the manifest's digests.

    Raises ShardError naming the file that is absent or differs, and OSError as ``load_manifest`` does.
    """
    images = _load_records(manifest, IMAGES_NAME, IMAGE_DTYPE, manifest.images)
    annotations = _load_records(manifest, ANNOTATIONS_NAME, ANNOTATION_DTYPE, manifest.annotations)
    return Index(images=images, annotations=annotations)


def check_file(manifest: Manifest, name: str) -> str | None:
    """What is wrong with one of ``manifest.files``, in one line, or None."""
    try:
        return _check_file(manifest, name)
    except OSError as error:
        return f"{storage.join(manifest.url, name)}: cannot be read: {error}; check the address and its permissions"


def _unreadable(path: str, error: OSError) -> Exception:
    """One line; a ShardError only for what stays as it is, as a shaky network or disk does not."""
    if isinstance(error, StoreError):
        return error
    kind = ShardError if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)) else OSError
    return kind(f"{path}: cannot be read: {error}; check the address and its permissions")


def _check_file(manifest: Manifest, name: str) -> str | None:
    expected = next((file for file in manifest.files if file.name == name), None)
    path = storage.join(manifest.url, name)
    if expected is None:
        return f"{storage.join(manifest.url, MANIFEST_NAME)}: {name} is not listed; write the data set again"
    try:
        content = storage.read(path)
    except FileNotFoundError:
        return f"{path}: no such file; the manifest lists it: copy it back or write the data set again"
    if len(content) != expected.bytes:
        return f"{path}: got {len(content)} bytes, expected {expected.bytes}: copy it again"
    if hashlib.sha256(content).hexdigest() != expected.sha256:
        return f"{path}: its sha256 is not the manifest's, so its content changed: copy it again"
    return None


def _load_records(manifest: Manifest, name: str, dtype: np.dtype[np.void], count: int) -> Records:
    url = storage.join(manifest.url, name)
    try:
        records = _load_array(manifest, name, url)
    except OSError as error:
        raise _unreadable(url, error) from error
    except ValueError as error:
        raise ShardError(f"{url}: not a NumPy array ({error}); write the data set again") from error
    if records.dtype != dtype or records.shape != (count,):
        raise ShardError(
            f"{url}: got {records.shape} records of {records.dtype}, expected {count} of {dtype}; "
            "write the data set again with this version"
        )
    return cast(Records, records)


def _load_array(manifest: Manifest, name: str, url: str) -> npt.NDArray[np.generic]:
    """One of ``manifest.files``, checked; mapped into memory where it lies on this machine or is kept here."""
    cache = cache_for(manifest.url, manifest.cache)
    listed = next((file for file in manifest.files if file.name == name), None)
    if cache is not None and listed is not None:
        item = Item(url, listed.bytes, listed.sha256)
        cache.check(item)
        descriptor = cache.open(item)
        try:
            return cast(npt.NDArray[np.generic], np.load(cache.path(item), mmap_mode="r", allow_pickle=False))
        finally:
            os.close(descriptor)
    problem = _check_file(manifest, name)
    if problem is not None:
        raise ShardError(problem)
    path = storage.local_path(url)
    if path is None:
        return cast(npt.NDArray[np.generic], np.load(io.BytesIO(storage.read(url)), allow_pickle=False))
    return cast(npt.NDArray[np.generic], np.load(path, mmap_mode="r", allow_pickle=False))


@functools.lru_cache(maxsize=16)
def _cached_index(manifest: Manifest) -> Index:
    return load_index(manifest)


class _Version(msgspec.Struct):
    format: int


def _parse(content: bytes, path: str) -> Manifest:
    try:
        version = msgspec.json.decode(content, type=_Version).format
        if version != FORMAT:
            raise ShardError(
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
        return "the file may not say its own url or cache"
    if ids != sorted(set(ids)) or not ids:
        return f"category ids are not ascending and distinct: {ids[:8]}"
    if manifest.images < 1 or manifest.annotations < 0 or manifest.samples_per_shard < 1:
        return f"impossible counts: {manifest.images} images, {manifest.annotations} annotations"
    if sum(shard.samples for shard in manifest.shards) != manifest.images:
        return f"the shards hold {sum(shard.samples for shard in manifest.shards)} samples, not {manifest.images}"
    # A manifest may come from elsewhere: it must not be able to name files outside its own folder.
    outside = [name for name in names if name.startswith("/") or ".." in name.split("/") or "://" in name]
    if outside:
        return f"file names leave the data set's folder: {outside[0]!r}"
    # A cache keeps shards by their names.
    nested = [shard.name for shard in manifest.shards if "/" in shard.name or not shard.name.strip(".")]
    return f"shards have names that are no plain file names: {nested[0]!r}" if nested else None
