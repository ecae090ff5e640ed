"""The bytes of samples, from the cache or from where they lie, each checked against the index.

Every range has a crc32. One that differs is read once more: a copy in the cache that changed on the disk is dropped and
fetched again, and what was damaged on its way arrives whole. What differs again is the data set's fault.
"""

import threading
import zlib

import numpy as np

from shards import storage
from shards.cache import cache_for
from shards.errors import BadSampleError
from shards.fetch import DigestError, Item
from shards.manifest import Manifest
from shards.ranges import CachedReader, Files, RangeReader

# Prefixes of the index's fields, and what messages say of each.
_IMAGE = ("", "", "its bytes")
_TEXT = ("text_", " of its segmentations", "its segmentations")
_Part = tuple[str, str, str]


class Members:
    """The encoded image and the segmentations of single samples; safe to share between threads."""

    def __init__(self, manifest: Manifest, *, cached: bool = True, lenient: bool = False) -> None:
        """``cached``: through the data set's cache, where it has one.

        ``lenient``: go on past it, sample by sample, where the store's shard is not the manifest's.
        """
        self._images = manifest.index().images
        self._shards = [shard.name for shard in manifest.shards]
        self._sizes = [shard.bytes for shard in manifest.shards]
        self._urls = [storage.join(manifest.url, name) for name in self._shards]
        cache = cache_for(manifest.url, manifest.cache) if cached else None
        self._found_damaged: dict[int, str] = {}
        self._finding = threading.Lock()
        self._files: Files = RangeReader()
        if cache is not None:
            self._files = CachedReader(cache, shard_items(manifest), lenient=lenient)

    def image(self, row: int) -> bytes:
        """The image file of a row.

        Raises BadSampleError naming the image where the bytes are not those that were written, ShardError where the
        shard is absent or as a whole not the manifest's; an OSError passes as it is: trying again may mend it.
        """
        return self._read(row, _IMAGE)[0]

    def segmentations(self, row: int) -> bytes:
        """The JSON of a row's segmentations, empty where it has none; raises as ``image`` does."""
        return self._read(row, _TEXT)[0] if self._images[row]["text_length"] else b""

    def both(self, row: int) -> tuple[bytes, bytes]:
        """Image and segmentations with one request, since they lie side by side; raises as ``image`` does."""
        if not self._images[row]["text_length"]:
            return self.image(row), b""
        image, text = self._read(row, _IMAGE, _TEXT)
        return image, text

    def name(self, row: int) -> str:
        """How messages call a sample."""
        record = self._images[row]
        return f"image {int(record['image_id'])} in {self._shards[int(record['shard'])]}"

    def close(self) -> None:
        """Let go of the shards' files."""
        self._files.close()

    def _read(self, row: int, *parts: _Part) -> list[bytes]:
        record = self._images[row]
        url = self._urls[int(record["shard"])]
        for last in (False, True):
            try:
                found = self._ranges(url, record, parts)
            except DigestError as error:
                raise DigestError(f"{self._damaged(int(record['shard']))}: {error}") from None
            problem = next(filter(None, map(_problem, parts, found, [record] * len(parts))), None)
            if problem is None:
                return found
            if not last:
                self._files.forget(url)
        raise BadSampleError(f"{self.name(row)}: {problem}")

    def _damaged(self, shard: int) -> str:
        """Which images of a shard are not as they were written, as the store has it now; it is read once for all threads."""
        with self._finding:
            if shard not in self._found_damaged:
                self._found_damaged[shard] = self._find_damaged(shard)
            return self._found_damaged[shard]

    def _find_damaged(self, shard: int) -> str:
        rows = np.flatnonzero(self._images["shard"] == shard)
        content = storage.read_range(self._urls[shard], 0, self._sizes[shard])
        bad = []
        for row in rows.tolist():
            record = self._images[row]
            places = [
                (part, int(record[f"{part[0]}offset"]), int(record[f"{part[0]}length"])) for part in (_IMAGE, _TEXT)
            ]
            if any(_problem(part, content[offset : offset + length], record) for part, offset, length in places):
                bad.append(row)
        if not bad:
            return f"{self._shards[shard]} beside its images"
        return self.name(bad[0]) + (f", and {len(bad) - 1} more of it" if len(bad) > 1 else "")

    def _ranges(self, url: str, record: np.void, parts: tuple[_Part, ...]) -> list[bytes]:
        places = [(int(record[f"{prefix}offset"]), int(record[f"{prefix}length"])) for prefix, _, _ in parts]
        start = min(offset for offset, _ in places)
        content = self._files.read(url, start, max(sum(place) for place in places) - start)
        if len(places) == 1:
            return [content]
        return [content[offset - start :][:length] for offset, length in places]


def _problem(part: _Part, content: bytes, record: np.void) -> str | None:
    prefix, of, what = part
    length = int(record[f"{prefix}length"])
    if len(content) != length:
        return f"got {len(content)} of {length} bytes{of}, the shard is truncated: copy it again"
    if zlib.crc32(content) != int(record[f"{prefix}crc32"]):
        return f"{what} changed since they were written: copy the shard again"
    return None


def shard_items(manifest: Manifest) -> list[Item]:
    """The shards, as the cache knows them."""
    return [Item(storage.join(manifest.url, shard.name), shard.bytes, shard.sha256) for shard in manifest.shards]
