"""Reader of torch.distributed.checkpoint folders that runs no code from them.

torch keeps a checkpoint's `.metadata` and every number in it as pickles and unpickles them without a check: anyone who
can write to the storage could run code on every worker that resumes. Here only the classes of such a checkpoint are
allowed.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"got {module}.{name}, expected only descriptions of tensors")
        return super().find_class(module, name)


class RestrictedReader(FileSystemReader):
    """Reader that rejects a `.metadata` with any class but descriptions of tensors.

    `files` opens the checkpoint's files; by default the operating system does.
    """

    def __init__(self, path: str | os.PathLike[str], files: FileSystem | None = None) -> None:
        super().__init__(path)
        self.failure: OSError | None = None
        """Error because of which the metadata could not be read; torch makes another of it."""
        if files is not None:
            self.fs, self.path = files, path

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Return the metadata; raise `pickle.UnpicklingError` for other classes. See `StorageReader.read_metadata`."""
        if self.failure:  # torch asks a second time for metadata of this rank alone, which do not exist here
            raise self.failure
        try:
            with self.fs.create_stream(self._get_metadata_path(), "rb") as file:
                metadata = _Unpickler(file).load()
        except OSError as error:
            self.failure = error
            raise
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"got a {type(metadata).__name__}, expected a checkpoint's metadata")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class RestrictedPlanner(DefaultLoadPlanner):
    """Planner that rejects a value, such as a learning rate, that is not made of numbers, text and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value; raise `pickle.UnpicklingError` for other classes. See `LoadPlanner.load_bytes`."""
        torch.load(value, weights_only=True)  # only a check: torch then reads the value with weights_only=False
        value.seek(0)
        super().load_bytes(read_item, value)
