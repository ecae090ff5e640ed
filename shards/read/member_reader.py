"""Bytes of single samples, read from the cache or directly and checked against the index.

Every byte range has a crc32. If it differs, the range is read once more, after a cached copy that changed on the disk
has been fetched again. If it differs a second time, the data set is damaged.
"""

import threading
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from shards.dataset.manifest import Manifest
from shards.errors import BadSampleError
from shards.store import storage
from shards.store.cache import cache_for
from shards.store.download import DigestError, Item
from shards.store.range_reader import CachedReader, RangeReader, RangeSource


class _Field(NamedTuple):
    """One byte range of a sample: prefix of its fields in the index, and its names in messages."""

    prefix: str
    of: str
    name: str


_IMAGE = _Field("", "", "its bytes")
_TEXT = _Field("text_", " of its segmentations", "its segmentations")
_PNG = _Field("text_", " of its PNG of segments", "the bytes of its PNG of segments")


class MemberReader:
    """Reader of the encoded image and the segmentations of single samples; safe to share between threads.

    cached: read through the data set's cache, if it has one. lenient: if a shard in the store is not the manifest's,
    read its samples one by one without the cache, instead of failing.
    """

    def __init__(self, manifest: Manifest, *, cached: bool = True, lenient: bool = False) -> None:
        self._images = manifest.index().images
        self._text = _PNG if manifest.panoptic else _TEXT
        self._shards = [shard.name for shard in manifest.shards]
        self._sizes = [shard.bytes for shard in manifest.shards]
        self._urls = [storage.join(manifest.url, name) for name in self._shards]
        cache = cache_for(manifest.url, manifest.cache) if cached else None
        self._damage: dict[int, str] = {}  # by number of the shard
        self._damage_lock = threading.Lock()
        self._files: RangeSource = RangeReader()
        if cache is not None:
            self._files = CachedReader(cache, shard_items(manifest), lenient=lenient)

    def image(self, row: int) -> bytes:
        """Return the image file of a row.

        Raise `BadSampleError`, naming the image, if the bytes changed since they were written, and `ShardError` if the
        shard is absent or is not the manifest's. An `OSError` passes unchanged: a retry may succeed.
        """
        return self._read(row, _IMAGE)[0]

    def segmentations(self, row: int) -> bytes:
        """Return the JSON of a row's segmentations, empty if it has none; raise as `image`."""
        if not self._images[row]["text_length"]:
            return b""
        return self._read(row, self._text)[0]

    def image_and_segmentations(self, row: int) -> tuple[bytes, bytes]:
        """Return image and segmentations of a row with one request, as they are adjacent; raise as `image`."""
        if not self._images[row]["text_length"]:
            return self.image(row), b""
        image, text = self._read(row, _IMAGE, self._text)
        return image, text

    def name(self, row: int) -> str:
        """Return the name of a sample in messages: image id and shard."""
        record = self._images[row]
        return f"image {int(record['image_id'])} in {self._shards[int(record['shard'])]}"

    def close(self) -> None:
        """Close the shards' files."""
        self._files.close()

    def _read(self, row: int, *fields: _Field) -> list[bytes]:
        record = self._images[row]
        url = self._urls[int(record["shard"])]
        for last in (False, True):
            try:
                contents = self._ranges(url, record, fields)
            except DigestError as error:
                raise DigestError(f"{self._damaged(int(record['shard']))}: {error}") from None
            problem = _problem(record, fields, contents)
            if problem is None:
                return contents
            if not last:
                self._files.invalidate(url)
        raise BadSampleError(f"{self.name(row)}: {problem}")

    def _damaged(self, shard: int) -> str:
        """Return a text that names the damaged images of a shard in the store; it is read once for all threads."""
        with self._damage_lock:
            if shard not in self._damage:
                self._damage[shard] = self._find_damaged(shard)
            return self._damage[shard]

    def _find_damaged(self, shard: int) -> str:
        rows = np.flatnonzero(self._images["shard"] == shard)
        content = storage.read_range(self._urls[shard], 0, self._sizes[shard])
        damaged = []
        for row in rows.tolist():
            record = self._images[row]
            spans = [_span(record, field) for field in (_IMAGE, _TEXT)]
            contents = [content[offset : offset + length] for offset, length in spans]
            if _problem(record, (_IMAGE, _TEXT), contents):
                damaged.append(row)
        if not damaged:
            return f"{self._shards[shard]} beside its images"
        name = self.name(damaged[0])
        return name if len(damaged) == 1 else f"{name}, and {len(damaged) - 1} more of it"

    def _ranges(self, url: str, record: np.void, fields: Sequence[_Field]) -> list[bytes]:
        """Return the byte ranges of `fields`, read with one request."""
        spans = [_span(record, field) for field in fields]
        start = min(offset for offset, _ in spans)
        end = max(offset + length for offset, length in spans)
        content = self._files.read(url, start, end - start)
        if len(spans) == 1:
            return [content]  # not copied
        return [content[offset - start :][:length] for offset, length in spans]


def _span(record: np.void, field: _Field) -> tuple[int, int]:
    """Return offset and length of a sample's byte range in its shard."""
    return int(record[f"{field.prefix}offset"]), int(record[f"{field.prefix}length"])


def _problem(record: np.void, fields: Sequence[_Field], contents: Sequence[bytes]) -> str | None:
    """Return a message if the bytes are not those that were written."""
    for field, content in zip(fields, contents, strict=True):
        _, length = _span(record, field)
        if len(content) != length:
            return f"got {len(content)} of {length} bytes{field.of}, the shard is truncated: copy it again"
        if zlib.crc32(content) != int(record[f"{field.prefix}crc32"]):
            return f"{field.name} changed since they were written: copy the shard again"
    return None


def shard_items(manifest: Manifest) -> list[Item]:
    """Return the shards as items of the cache."""
    return [Item(storage.join(manifest.url, shard.name), shard.bytes, shard.sha256) for shard in manifest.shards]
