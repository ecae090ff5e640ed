"""One file of a store into a local one: in pieces, several at a time, its sha256 checked on the way."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from shards import storage
from shards.errors import ShardError

PIECE = 8 << 20  # bytes per request: fewer cost throughput, more cost memory
PARALLEL = 4  # requests under way for one file; several files are fetched at once by several threads


@dataclass(frozen=True)
class Item:
    """A file of a data set: where it is, and what it is by its length and its sha256."""

    url: str
    bytes: int
    sha256: str


class DigestError(ShardError):
    """What the store holds is not what the manifest lists."""


def fetch(item: Item, descriptor: int) -> None:
    """Write the file into an open one. What arrives changed is fetched once more.

    Raises DigestError where the store holds something else, ShardError where it holds nothing, and what
    ``shards.retry`` raises.
    """
    for last in (False, True):
        digest = hashlib.sha256()
        length = 0
        for offset, content in _pieces(item):
            digest.update(content)
            length += len(content)
            _write(descriptor, content, offset)
        if digest.hexdigest() == item.sha256:
            return
        if length < item.bytes:
            raise DigestError(f"{item.url}: truncated: got {length} bytes, expected {item.bytes}: copy it again")
        if last:
            raise DigestError(
                f"{item.url}: its sha256 is not the manifest's, so its bytes changed since they were written: copy it "
                "again (`detr shard verify` names what changed)"
            )


def _pieces(item: Item) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of a file's pieces in order; ends early where the file does."""
    offsets = iter(range(0, item.bytes, PIECE))
    waiting: deque[tuple[int, int, Future[bytes]]] = deque()
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch")
    try:
        while True:
            while len(waiting) < PARALLEL and (offset := next(offsets, None)) is not None:
                length = min(PIECE, item.bytes - offset)
                waiting.append((offset, length, pool.submit(storage.read_range, item.url, offset, length)))
            if not waiting:
                return
            offset, length, piece = waiting.popleft()
            content = piece.result()
            yield offset, content
            if len(content) < length:
                return
    except FileNotFoundError:
        raise storage.absent(item.url) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
