"""Location of a run's checkpoints, a folder or a URL, and the writer and reader for URLs.

A store behind a URL cannot rename, so uploading `meta.json` last completes a checkpoint. It names the folder of the
state:

    STORE/NAME-ID/checkpoints/step-00001000/meta.json          {"state_folder": "8f1c...", ...}
                                            8f1c.../           *.distcp, .metadata
                                            evaluation.json

Every attempt uploads into a new folder. A checkpoint can therefore be written again without a moment in which there is
none, files of two attempts are never mixed, and nothing refers to the files of a killed attempt, which pruning removes.

A rank's slice of the state is serialised in memory and uploaded as one object, and read as one, because only a complete
request can be repeated after an error. Until then it takes host memory: 1.2 GB measured for a slice of 468 MB to S3.
s3fs uploads large objects in pieces; the pieces of a killed upload are not visible here, and the bucket's rules remove
them.
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
    """Address in a store; joined with `/` like a `Path`."""

    url: str

    def __truediv__(self, name: str) -> Url:
        return Url(storage.join(self.url, name))

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Last component of the address."""
        return self.url.rpartition("/")[2]


Location = Path | Url


def home_of(store: str, run_folder: Path) -> Location:
    """Return the parent of a run's `checkpoints`: the run's folder, or its name below `store` (`CheckpointConfig`)."""
    if not store:
        return run_folder
    path = storage.local_path(store)
    return path / run_folder.name if path is not None else Url(storage.join(store, run_folder.name))


def check(store: str) -> None:
    """Write and remove a small file below the store's URL; raise `RunConfigError` if that fails.

    It is tried a few times only: a person waits for the answer.
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
        # The message starts with the address and has a remedy, but must name the store instead of this file.
        raise RunConfigError(f"checkpoint.store {str(error).replace('/' + name, '')}") from None
    except OSError as error:
        raise RunConfigError(
            f"checkpoint.store {store} cannot be written ({first_line(error)}); expected a folder or URL that this machine "
            "and every worker may write: give another --checkpoint.store"
        ) from None


def complete_in_store(home: Url) -> list[Url]:
    """Return the complete checkpoints of a run in a store, oldest first."""
    files = [name.split("/") for name in storage.listing(str(home / _CHECKPOINTS))]
    steps = sorted(names[0] for names in files if names[0].startswith("step-") and names[1:] == [META])
    return [home / _CHECKPOINTS / step for step in steps]


def upload(target: Url, state: dict[str, Any], ranks: Ranks) -> str:
    """Upload a state into a new folder of the checkpoint at `target` and return its name; a collective call."""
    folder = ranks.broadcast(secrets.token_hex(8))
    writer = _Writer(str(target / folder))
    save_distributed(state, storage_writer=writer, process_group=ranks.group, no_dist=ranks.world_size == 1)
    return folder


def reader(path: Url, state_folder: str) -> RestrictedReader:
    """Return the reader of a checkpoint's state."""
    return RestrictedReader(str(path / state_folder), _Files())


def discard(path: Location) -> None:
    """Delete a checkpoint; from the first moment on it is incomplete."""
    if isinstance(path, Path):
        shutil.rmtree(path.rename(path.with_name(path.name + _DELETED)), ignore_errors=True)
        return
    meta_first = sorted(storage.listing(str(path)), key=lambda name: name != META)
    for name in meta_first:
        storage.remove(str(path / name))


def clear(home: Location, state_folder_of: Callable[[Url], str]) -> None:
    """Delete the remains of killed writes and deletions; nothing may be written meanwhile.

    `state_folder_of` returns the folder that a complete checkpoint in a store uses.
    """
    if isinstance(home, Path):
        for folder in (home / _CHECKPOINTS).glob(f"*{PARTIAL}"):
            shutil.rmtree(folder, ignore_errors=True)
        return
    files = storage.listing(str(home / _CHECKPOINTS))
    steps = {name.partition("/")[0] for name in files if name.startswith("step-")}
    for step in steps:
        path = home / _CHECKPOINTS / step
        names = [name.partition("/")[2] for name in files if name.startswith(f"{step}/")]
        for name in _leftovers(path, names, state_folder_of):
            storage.remove(str(path / name))


def _leftovers(path: Url, names: list[str], state_folder_of: Callable[[Url], str]) -> list[str]:
    """Return the files of a checkpoint that are not in use: all of them if it is incomplete."""
    if META not in names:
        return names
    folders = {name.partition("/")[0] for name in names if "/" in name}
    used = state_folder_of(path) if len(folders) > 1 else ""  # one folder is in use without reading `meta.json`
    if not used:
        return []
    return [name for name in names if "/" in name and name.partition("/")[0] != used]


class FolderWriter(FileSystemWriter):
    """torch's writer, with the system's error for a file that cannot be written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
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
    """File system for torch's reader and writer that transfers complete objects only."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Yield the object's content to read, or a buffer that is uploaded if the block ends without an error."""
        if mode == "rb":
            yield io.BytesIO(storage.read(str(path)))
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


class _Writer(FileSystemWriter):
    def __init__(self, url: str) -> None:
        super().__init__(url, sync_files=False)
        self.fs, self.path = _Files(), url
