"""Download of one file from a store into a local file, in parallel chunks, with a check of its sha256."""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from shards.errors import ShardError
from shards.store import storage

PIECE = 8 << 20  # bytes per request: fewer cost throughput, more cost memory
PARALLEL = 4  # concurrent requests for one file; several threads may fetch a file each


@dataclass(frozen=True)
class Item:
    """A file of a data set: its address, its length and its sha256."""

    url: str
    bytes: int
    sha256: str


class DigestError(ShardError):
    """Raised when a file in the store differs from the one that the manifest lists."""


def fetch(item: Item, descriptor: int) -> None:
    """Download a file into an open one; fetch it once more if its digest is wrong.

    Raise `DigestError` if the store's file differs, `ShardError` if it is absent or access is denied, and `StoreError`
    if the store does not respond.
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
    """Yield (offset, bytes) of a file's chunks in order; stop early if the file is shorter than listed."""
    offsets = iter(range(0, item.bytes, PIECE))
    pending: deque[tuple[int, int, Future[bytes]]] = deque()
    pool = ThreadPoolExecutor(PARALLEL, thread_name_prefix="fetch")
    try:
        while True:
            while len(pending) < PARALLEL and (offset := next(offsets, None)) is not None:
                length = min(PIECE, item.bytes - offset)
                pending.append((offset, length, pool.submit(storage.read_range, item.url, offset, length)))
            if not pending:
                return
            offset, length, request = pending.popleft()
            content = request.result()
            yield offset, content
            if len(content) < length:
                return
    except FileNotFoundError:
        raise storage.missing_file_error(item.url) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write(descriptor: int, content: bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
