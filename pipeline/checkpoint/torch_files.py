"""Adapters with which `torch.distributed.checkpoint` writes folders, and writes and reads stores by URL.

In a store, a rank's slice of the state is serialised in memory and uploaded as one object, because only a complete
request can be repeated after an error. Until then it takes host memory: 1.2 GB measured for a slice of 468 MB
to S3. s3fs uploads large objects in pieces; the pieces of a killed upload are not visible here, and the bucket's rules
remove them.
"""

from __future__ import annotations

import io
import os
import secrets
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.futures import Future

from pipeline.checkpoint.location import Url
from pipeline.checkpoint.safe_reader import RestrictedReader
from pipeline.distributed.ranks import Ranks
from shards.store import storage

_GAP = 1 << 20
"""Bytes that arrive while a store answers a request: 30 ms at 35 MB/s."""
_ON_HOST = 0
"""Bytes that torch's writer copies ahead: none, since the state is on the host. Else it uses a stream of the current GPU."""


def save(state: dict[str, Any], writer: FileSystemWriter, planner: SavePlanner, ranks: Ranks) -> None:
    """Write a state; a collective call."""
    alone = ranks.world_size == 1
    save_distributed(state, storage_writer=writer, planner=planner, process_group=ranks.group, no_dist=alone)


def upload(target: Url, state: dict[str, Any], planner: SavePlanner, ranks: Ranks) -> str:
    """Upload a state into a new folder of the checkpoint at `target` and return its name; a collective call."""
    folder = ranks.broadcast(secrets.token_hex(8))
    save(state, _Writer(str(target / folder)), planner, ranks)
    return folder


def reader(path: Url, state_folder: str) -> RestrictedReader:
    """Return the reader of a checkpoint's state."""
    return _Reader(str(path / state_folder))


class FolderWriter(FileSystemWriter):
    """torch's writer, with the system's error for a file that cannot be written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=_ON_HOST)
        self.fs = _Folder()


class _Folder(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file; on a full disk raise the system's error instead of torch's, which has only offsets."""
        with super().create_stream(path, mode) as stream:
            try:
                yield stream
            except RuntimeError as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise (cause or error) from None


class _Files(FileSystem):
    """File system for torch's reader and writer: writes complete objects, and reads `ranges` of them or all."""

    def __init__(self) -> None:
        self.ranges: dict[str, list[tuple[int, int]]] = {}
        """First byte and end of each range, in order, by the address of the object."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Yield the object's content to read, or a buffer that is uploaded if the block ends without an error."""
        if mode == "rb":
            ranges = self.ranges.get(str(path))
            yield _Pieces(str(path), ranges) if ranges else io.BytesIO(storage.read(str(path)))
            return
        stream = _Buffer()
        yield stream
        storage.write(str(path), stream.getvalue())

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return storage.join(str(path), suffix)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Copy the object and remove the old one; called only for `.metadata`, which is small."""
        storage.write(str(new_path), storage.read(str(path)))
        storage.remove(str(path))

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return path

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """Do nothing: a store has no folders."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" in str(checkpoint_id)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return storage.exists(str(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        storage.remove(str(path))


class _Buffer(io.BytesIO):
    """Buffer that stays open: torch closes its files, and a closed buffer loses its content."""

    def close(self) -> None:
        pass


class _Reader(RestrictedReader):
    """Reader that fetches only what this rank needs of each object, neighbouring tensors in one request."""

    def __init__(self, url: str) -> None:
        self._files = _Files()
        super().__init__(url, self._files)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what the plan lists. See `StorageReader.read_data`."""
        wanted: dict[str, list[tuple[int, int]]] = {}
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            url = storage.join(str(self.path), stored.relative_path)
            wanted.setdefault(url, []).append((stored.offset, stored.offset + stored.length))
        self._files.ranges = {url: _joined(ranges) for url, ranges in wanted.items()}
        return super().read_data(plan, planner)


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges in order, with those joined between which a request costs more than the bytes of the gap."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start - joined[-1][1] <= _GAP:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


class _Pieces(io.RawIOBase):
    """Content of some ranges of an object, to be read at their places."""

    def __init__(self, url: str, ranges: list[tuple[int, int]]) -> None:
        self._starts = [start for start, _ in ranges]
        self._pieces = [storage.read_range(url, start, end - start) for start, end in ranges]
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a position; see `io.IOBase.seek`."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence, self._starts[-1] + len(self._pieces[-1]))
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into the buffer, up to the end of a range; nothing outside of the ranges."""
        number = bisect_right(self._starts, self._position) - 1
        start = self._position - self._starts[number] if number >= 0 else 0
        found = memoryview(self._pieces[number])[start : start + len(buffer)] if number >= 0 else memoryview(b"")
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


class _Writer(FileSystemWriter):
    def __init__(self, url: str) -> None:
        super().__init__(url, sync_files=False, per_thread_copy_ahead=_ON_HOST)
        self.fs, self.path = _Files(), url
