"""A data set through webdataset's own pipeline, for training code other than this project's.

webdataset imports torch, so it is imported when a pipeline is made and not with this module.
"""

import io
import os
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import msgspec
import numpy as np

from shards.config import CacheConfig
from shards.dataset.index import Index
from shards.dataset.manifest import Manifest, load_index, load_manifest
from shards.dataset.tars import IMAGE_ENDINGS, SEGMENTATIONS, SEGMENTS
from shards.dataset.verify import Report
from shards.errors import ShardError
from shards.read.member_reader import shard_items
from shards.store import storage
from shards.store.cache import Cache, cache_for
from shards.store.download import PIECE, Item
from shards.store.retry import StoreError
from shards.workers import Progress

_SEGMENTATIONS, _SEGMENTS = SEGMENTATIONS.removeprefix("."), SEGMENTS.removeprefix(".")


def open_webdataset(
    url: str | os.PathLike[str],
    cache: CacheConfig | None = None,
    *,
    shardshuffle: int | bool = False,
    **options: Any,
) -> Any:
    """Return a `webdataset.WebDataset` over the shards of the data set at `url`, a folder or a URL that fsspec knows.

    Its samples are dictionaries of undecoded bytes: the image under its ending (`jpg`, `png`), `json` with the image's
    entry and its annotations, and `segmentation.json` where there are any. Append stages as usual, such as
    `.shuffle(1000).decode("rgb8")`. Only images and JSON are delivered, so `decode` never unpickles what a foreign tar
    may hold.

    Shards are divided among ranks and DataLoader workers; give `nodesplitter` or `workersplitter` to do it otherwise.
    `shardshuffle` is the number of shards to shuffle together; `options` are the other arguments of `WebDataset`.
    Shards are opened through `cache` as in `load_manifest`, never by a command (`pipe:`). Raise `ShardError` when there
    is no data set at `url`; iterating raises it when a shard is missing or, with a cache, differs from the manifest.
    """
    manifest = load_manifest(url, cache)
    return _pipeline(manifest, [item.url for item in shard_items(manifest)], shardshuffle=shardshuffle, **options)


def verify_stock(url: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Read every sample of a data set through webdataset's pipeline and compare it with the index.

    Image and segmentations are compared by length and crc32, annotations by their ids, or by their number when the ids
    were given in order by `detr shard index`. Shards are read from the store and not from the cache. Damage is reported
    and not raised, one line for each kind and shard; raise `ShardError` when manifest or index cannot be read.
    """
    manifest = load_manifest(url, CacheConfig(folder="off"))
    index = load_index(manifest)
    problems: list[str] = []
    for number, item in enumerate(shard_items(manifest)):
        problems += _check_shard(manifest, index, number, item.url)
        if progress is not None:
            progress(number + 1, len(manifest.shards))
    total = sum(shard.bytes for shard in manifest.shards)
    return Report(manifest.url, manifest.images, len(manifest.shards), total, tuple(problems))


def _pipeline(manifest: Manifest, urls: list[str], **options: Any) -> Any:
    import webdataset

    options.setdefault("nodesplitter", webdataset.split_by_node)
    dataset = webdataset.WebDataset(urls, select_files=_is_image_or_json, **options)
    openers = (webdataset.cache.StreamingOpen, webdataset.cache.FileCache)
    dataset.pipeline = [_Opener(manifest) if isinstance(stage, openers) else stage for stage in dataset.pipeline]
    return dataset


@dataclass(frozen=True)
class _Opener:
    """A pipeline stage that opens shards through this package; webdataset's own would run `pipe:` commands."""

    manifest: Manifest

    def __call__(self, sources: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        cache = cache_for(self.manifest.url, self.manifest.cache)
        items = {item.url: item for item in shard_items(self.manifest)}
        for source in sources:
            item = items[source["url"]]
            with _open(item, cache) as stream:
                yield {"url": item.url, "stream": stream}


def _open(item: Item, cache: Cache | None) -> IO[bytes]:
    if cache is not None:
        return os.fdopen(cache.open(item), "rb")
    path = storage.local_path(item.url)
    if path is None:
        return io.BufferedReader(_RemoteFile(item.url), PIECE)
    try:
        with storage.error_context(item.url):
            return path.open("rb")
    except FileNotFoundError:
        raise storage.missing_file_error(item.url) from None


class _RemoteFile(io.RawIOBase):
    """A file of a store, read from its start to its end by ranges."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._offset = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = storage.read_range(self._url, self._offset, len(buffer))
        except FileNotFoundError:
            raise storage.missing_file_error(self._url) from None
        buffer[: len(content)] = content
        self._offset += len(content)
        return len(content)


def _is_image_or_json(name: str) -> bool:
    ending = name.rpartition(".")[2].lower()
    return ending == "json" or ending in IMAGE_ENDINGS


def _check_shard(manifest: Manifest, index: Index, number: int, url: str) -> list[str]:
    texts = "panoptic PNGs" if manifest.panoptic else "segmentations"
    wrong: dict[str, list[int]] = {"images": [], texts: [], "annotations": []}
    rows: defaultdict[tuple[int, int], list[int]] = defaultdict(list)  # of samples not yet seen, by length and crc32
    shard_rows = np.flatnonzero(index.images["shard"] == number)
    for row in shard_rows[::-1].tolist():
        rows[int(index.images["length"][row]), int(index.images["crc32"][row])].append(row)
    ids = index.annotations["annotation_id"]
    numbered = bool((np.diff(ids) > 0).all())
    try:
        for sample in _pipeline(manifest, [url], shardshuffle=False, nodesplitter=None, empty_check=False):
            row = _find(sample, rows)
            if row is None:
                continue  # left out of the index, or changed: then its row stays in `rows`
            record = index.images[row]
            text = sample.get(_SEGMENTS if manifest.panoptic else _SEGMENTATIONS, b"")
            if (len(text), zlib.crc32(text)) != (int(record["text_length"]), int(record["text_crc32"])):
                wrong[texts].append(row)
            expected = index.annotations_of(row)["annotation_id"].tolist()
            found = _annotation_ids(sample)
            if found is None or len(found) != len(expected) or (found != expected and not numbered):
                wrong["annotations"].append(row)
    except StoreError:
        raise
    except ShardError as error:
        return [_reason(error)]
    except (tarfile.TarError, ValueError, OSError) as error:
        return [f"{url}: webdataset cannot read it: {_reason(error)}: copy it again"]
    wrong["images"] = sorted(row for left in rows.values() for row in left)
    return [
        f"{url}: through webdataset, {kind} of {len(bad)} of its {len(shard_rows)} samples are missing or differ from "
        f"the index, such as image {int(index.images['image_id'][bad[0]])}: copy it again"
        for kind, bad in wrong.items()
        if bad
    ]


def _find(sample: dict[str, Any], rows: dict[tuple[int, int], list[int]]) -> int | None:
    """Remove and return the row whose image is one of the sample's files; None when no row is left for it."""
    for ending, content in sample.items():
        if ending.rpartition(".")[2] not in IMAGE_ENDINGS:
            continue
        left = rows.get((len(content), zlib.crc32(content)))
        if left:
            return left.pop()
    return None


def _reason(error: Exception) -> str:
    """Return an error's own message; webdataset appends its file object and more arguments."""
    return str(error.args[0]).partition(" @ ")[0] if error.args else str(error)


class _Annotation(msgspec.Struct, gc=False):
    id: Any = None


class _Entry(msgspec.Struct):
    annotations: list[_Annotation] | None = None
    objects: list[_Annotation] | None = None


_entry = msgspec.json.Decoder(list[_Annotation] | _Entry)


def _annotation_ids(sample: dict[str, Any]) -> list[Any] | None:
    """Return the ids in a sample's JSON, in its order; None when the JSON cannot be read."""
    names = [name for name in sample if name.rpartition(".")[2] == "json" and name != _SEGMENTATIONS]
    if not names:
        return []
    try:
        entry = _entry.decode(sample["json" if "json" in names else names[0]])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if isinstance(entry, _Entry):
        entry = entry.objects or [] if entry.annotations is None else entry.annotations
    return [annotation.id for annotation in entry]
