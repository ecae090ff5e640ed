"""Where the checkpoints of a run lie, and what differs where that is a store that is reached by URL and not a folder.

Nothing can be renamed there, so `meta.json`, uploaded last, makes a checkpoint whole. It names the part that holds the state:

    STORE/NAME-ID/checkpoints/step-00001000/meta.json          {"part": "8f1c...", ...}
                                            8f1c.../           *.distcp, .metadata
                                            evaluation.json

Every attempt uploads into a part of its own. A checkpoint can therefore be written again without a moment in which there
is none, files of two attempts are never mixed, and what a killed attempt leaves is named by nothing: pruning removes it.

A rank's share of the state is serialised in memory and uploaded as one object, as it is read, because then all of it can
be asked for again (`shards/retry.py`). While that lasts it takes host memory: measured for a share of 468 MB, 1.2 GB to S3.
There s3fs sends large objects in parts; those of an upload that was killed are not seen here, and go by the bucket's rules.
"""

from __future__ import annotations

import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from pipeline.errors import RunConfigError, first_line
from pipeline.parallel import Ranks
from pipeline.restricted import RestrictedReader
from shards import storage
from shards.errors import ShardError
from shards.retry import StoreError, hurried

META = "meta.json"
PARTIAL = ".partial"
_DELETED = ".deleted" + PARTIAL
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, order=True)
class Url:
    """An address in a store, put together as a `Path` is."""

    url: str

    def __truediv__(self, name: str) -> Url:
        return Url(storage.join(self.url, name))

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """What stands after the last slash."""
        return self.url.rpartition("/")[2]


Location = Path | Url


def home_of(store: str, run_folder: Path) -> Location:
    """What holds a run's `checkpoints`: its folder, or a folder of the same name below `store` (`CheckpointConfig`)."""
    if not store:
        return run_folder
    path = storage.local_path(store)
    return path / run_folder.name if path is not None else Url(storage.join(store, run_folder.name))


def check(store: str) -> None:
    """Write a small file below the store's URL and remove it, before anything depends on it.

    Raises `RunConfigError` where it cannot be, after a few attempts only: a person waits for the answer.
    """
    if store.startswith("memory://"):
        raise RunConfigError(
            f"checkpoint.store {store} is the memory of each process, and what is saved there is lost with it; expected a "
            "folder or URL that this machine and every worker may write: give another --checkpoint.store"
        )
    name = f".detr-{secrets.token_hex(8)}"
    probe = storage.join(store, name)
    try:
        with hurried():
            storage.write(probe, b"may checkpoints be written here?")
            storage.remove(probe)
    except (StoreError, ShardError) as error:
        # It begins with the address, says what to do, and is to name the store and not this file.
        raise RunConfigError(f"checkpoint.store {str(error).replace('/' + name, '')}") from None
    except OSError as error:
        raise RunConfigError(
            f"checkpoint.store {store} cannot be written ({first_line(error)}); expected a folder or URL that this machine "
            "and every worker may write: give another --checkpoint.store"
        ) from None


def complete_in_store(home: Url) -> list[Url]:
    """The whole checkpoints of a run, oldest first."""
    found = [name.split("/") for name in storage.listing(str(home / _CHECKPOINTS))]
    steps = sorted(names[0] for names in found if names[0].startswith("step-") and names[1:] == [META])
    return [home / _CHECKPOINTS / step for step in steps]


def upload(target: Url, state: dict[str, Any], ranks: Ranks) -> str:
    """Upload a state as a new part of the checkpoint at `target`; returns the part's name. A collective call."""
    part = ranks.gather(secrets.token_hex(8))[0]
    writer = _Writer(str(target / part))
    save_distributed(state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.world_size == 1)
    return str(part)


def reader(path: Url, part: str) -> RestrictedReader:
    """What reads that part of a checkpoint."""
    return RestrictedReader(str(path / part), _Files())


def discard(path: Location) -> None:
    """Remove a checkpoint, which counts no more from the first moment."""
    if isinstance(path, Path):
        shutil.rmtree(path.rename(path.with_name(path.name + _DELETED)), ignore_errors=True)
        return
    for name in sorted(storage.listing(str(path)), key=lambda name: name != META):
        storage.remove(str(path / name))


def clear(home: Location, part_of: Callable[[Url], str]) -> None:
    """Remove what kills left in the middle of writing or of discarding, while nothing is written.

    part_of: which part of a checkpoint counts.
    """
    if isinstance(home, Path):
        for left in (home / _CHECKPOINTS).glob(f"*{PARTIAL}"):
            shutil.rmtree(left, ignore_errors=True)
        return
    files = storage.listing(str(home / _CHECKPOINTS))
    steps = {name.partition("/")[0] for name in files if name.startswith("step-")}
    for step in steps:
        names = [name.partition("/")[2] for name in files if name.startswith(f"{step}/")]
        parts = {name.partition("/")[0] for name in names if "/" in name}
        whole = META in names
        kept = part_of(home / _CHECKPOINTS / step) if whole and len(parts) > 1 else ""
        for name in names:
            part, inside, _ = name.partition("/")
            if not whole or (kept and inside and part != kept):
                storage.remove(str(home / _CHECKPOINTS / step / name))


class FolderWriter(FileSystemWriter):
    """torch's own, but for what it says of a file that cannot be written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.fs = _Folder()


class _Folder(FileSystem):
    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """On a full disk torch's archive speaks of positions only; raises what the system said instead."""
        with super().create_stream(path, mode) as stream:
            try:
                yield stream
            except RuntimeError as error:
                cause: BaseException | None = error
                while cause is not None and not isinstance(cause, OSError):
                    cause = cause.__context__
                raise (cause or error) from None


class _Files(FileSystem):
    """Whole objects, for torch's reader and writer."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """The object's content, to read; or a buffer that becomes the object when the block ends without an error."""
        if mode == "rb":
            yield io.BytesIO(storage.read(str(path)))
            return
        stream = _Buffer()
        yield stream
        storage.write(str(path), stream.getvalue())

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return storage.join(str(path), suffix)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        """Of `.metadata` only, which is small."""
        storage.write(str(new_path), storage.read(str(path)))
        storage.remove(str(path))

    def init_path(self, path: str | os.PathLike[str]) -> str | os.PathLike[str]:
        return path

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        """A store has no folders."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" in str(checkpoint_id)

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return storage.exists(str(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        storage.remove(str(path))


class _Buffer(io.BytesIO):
    """torch closes what it has written, and a closed buffer has no content."""

    def close(self) -> None:
        pass


class _Writer(FileSystemWriter):
    def __init__(self, url: str) -> None:
        super().__init__(url, sync_files=False)
        self.fs, self.path = _Files(), url
