"""Folders of images, on a disk or by URL: files and their sizes from one listing."""

import errno
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from shards.errors import ShardError
from shards.store import storage


def require(path: Path, kind: str) -> None:
    if not path.exists():
        raise ShardError(f"{path}: no such {kind}; expected the path of an existing one: check it for a typo")
    if path.is_dir() != kind.startswith("folder"):
        found = "folder" if path.is_dir() else "file"
        options = "--segments is right" if "segments" in kind else "--images and --annotations are right"
        raise ShardError(f"{path}: is a {found}, expected a {kind}: check that {options}")


def file_sizes(folder: str, names: Iterable[str]) -> dict[str, int]:
    """Return the size in bytes of each of `names` in a folder or below a URL; names that are not files are left out."""
    local = storage.local_path(folder)
    if local is None:
        sizes = storage.listing(folder)
        return {name: sizes[name] for name in names if name in sizes}
    found = {}
    for name in names:
        try:
            found[name] = (local / name).stat().st_size
        except OSError:
            continue
    return found


def file_finder(folder: str, kind: str = "folder of images") -> Callable[[str], bool]:
    """Return a function that tells if the folder has a file, from one listing instead of a request per image."""
    local = storage.local_path(folder)
    if local is None:
        remote = storage.listing(folder)
        if not remote:
            raise ShardError(f"{folder}: holds no files; expected a {kind}: check it for a typo")
        return remote.__contains__
    present = set(os.listdir(local))
    return lambda name: name in present or _is_file(local / name)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # no file can have such a name
            return False
        raise
