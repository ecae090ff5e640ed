"""Reading of the files that a manifest lists beside the shards, checked against its digests."""

import hashlib
import io
import os
from typing import cast

import msgspec
import numpy as np
import numpy.typing as npt

from shards.errors import ShardError
from shards.store import storage
from shards.store.cache import Cache
from shards.store.download import Item

Array = npt.NDArray[np.generic]


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file beside the shards: name, length in bytes and sha256."""

    name: str
    bytes: int
    sha256: str


def read_listed(url: str, file: File) -> bytes:
    """Return the content of a listed file.

    Raise `ShardError` if the file is absent or differs, and `OSError`, naming it, if a retry may succeed.
    """
    try:
        with storage.error_context(url):
            content = storage.read(url)
    except FileNotFoundError:
        raise storage.missing_file_error(url) from None
    if len(content) != file.bytes:
        raise ShardError(f"{url}: got {len(content)} bytes, expected {file.bytes}: copy it again")
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise ShardError(f"{url}: its sha256 is not the manifest's, so its content changed: copy it again")
    return content


def load_listed(url: str, file: File, cache: Cache | None) -> Array:
    """Return the array in a .npy file, mapped into memory if the file is local or cached.

    Raise as `read_listed` and `Cache.open`, and `ShardError` if the file holds no array.
    """
    try:
        if cache is not None:
            return _load_kept(cache, Item(url, file.bytes, file.sha256))
        content = read_listed(url, file)
        path = storage.local_path(url)
        # A remote file is not read again, because only these bytes were checked.
        return _load(io.BytesIO(content)) if path is None else _load(path)
    except ValueError as error:
        raise ShardError(f"{url}: not a NumPy array ({error}); write the data set again") from error


def _load_kept(cache: Cache, item: Item) -> Array:
    cache.check(item)
    descriptor = cache.open(item)
    try:
        array = _load(cache.path(item))
    except BaseException:
        os.close(descriptor)
        raise
    # A mapped file keeps its disk blocks even when it is deleted, so the cache would exceed its limit.
    cache.keep_while_used(item, descriptor, array.base)
    return array


def _load(source: io.BytesIO | os.PathLike[str]) -> Array:
    if isinstance(source, io.BytesIO):
        return cast(Array, np.load(source, allow_pickle=False))
    return cast(Array, np.load(source, mmap_mode="r", allow_pickle=False))
