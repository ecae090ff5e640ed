"""Local paths and remote URLs behind the same few functions.

Local files go straight through the operating system (a ranged read is one ``pread``); everything with another
``scheme://`` goes through fsspec, patiently (``shards.retry``). fsspec keeps one file system per store and process,
whose event loop has a thread of its own: any thread may read, and no process may fork afterwards. Credentials come from
the environment and never stand in an address, which logs, job specs and MLflow show.
"""

import errno
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from shards.errors import ShardError
from shards.retry import StoreError, patiently


def local_path(url: str) -> Path | None:
    """The path that a plain path or a ``file://`` URL names, or None for a remote URL."""
    if url.startswith("file://"):
        return Path(url[len("file://") :])
    return None if "://" in url else Path(url)


def _remote(url: str) -> tuple[Any, str]:
    """The file system of a remote URL and the name in it; raises ShardError where fsspec has none for it."""
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):
        known = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {**known, "retries": {"total_max_attempts": 1}}
    try:
        filesystem, name = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url}: cannot be reached: {error}; expected a path or a URL that fsspec can open") from None
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs and gcsfs would try again on their own, for minutes
    return filesystem, name


def refuse_secret(url: str) -> None:
    """Raises ShardError where an address holds a password or a signature, without repeating it."""
    scheme, separator, rest = url.partition("://")
    # A password may hold slashes, so it is looked for up to the last @; a port is digits up to the first slash.
    if separator and (re.match(r"[^/@]*:(?!\d*(/|$)).*@", rest) or re.search(r"\?.*=", rest)):
        raise ShardError(
            f"the {scheme}:// address holds a password or a signature, which logs and MLflow would show; expected none: "
            "give credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3) or in fsspec's "
            "configuration (FSSPEC_... variables)"
        )


def absolute(url: str) -> str:
    """A local path made absolute; a remote URL without its last slashes. Raises ShardError as ``refuse_secret`` does."""
    refuse_secret(url)
    path = local_path(url)
    return url.rstrip("/") if path is None else str(path.absolute())


def join(url: str, *parts: str) -> str:
    """``url`` with ``parts`` appended, each after one slash."""
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    path = local_path(url)
    if path is not None:
        return path.exists()
    filesystem, name = _remote(url)
    return bool(patiently(lambda: filesystem.exists(name), url))


def size(url: str) -> int:
    """Bytes of the file at ``url``; raises FileNotFoundError where there is none."""
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    filesystem, name = _remote(url)
    return int(patiently(lambda: filesystem.size(name), url))


def age_s(url: str) -> float:
    """Seconds since a remote file was written, by the store's clock and this machine's; infinite where it is not known."""
    filesystem, name = _remote(url)
    try:
        return time.time() - float(patiently(lambda: filesystem.modified(name), url).timestamp())
    except (FileNotFoundError, NotImplementedError):
        return math.inf  # it is gone meanwhile, or fsspec's file system for this store cannot tell


def read(url: str) -> bytes:
    """The whole file; raises FileNotFoundError where there is none."""
    path = local_path(url)
    if path is not None:
        return path.read_bytes()
    filesystem, name = _remote(url)
    return bytes(patiently(lambda: filesystem.cat_file(name), url))


def read_range(url: str, offset: int, length: int) -> bytes:
    """``length`` bytes from ``offset``, fewer only where the file ends before; FileNotFoundError where there is none."""
    path = local_path(url)
    if path is not None:
        return patiently(lambda: _local_range(path, offset, length), url)
    filesystem, name = _remote(url)

    def ask() -> bytes:
        try:
            return bytes(filesystem.cat_file(name, start=offset, end=offset + length))
        except OSError as error:
            # S3's answer to a range that begins behind the end.
            if error.errno == errno.EINVAL and offset >= int(filesystem.size(name)):
                return b""
            raise

    return patiently(ask, url)


def _local_range(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def download(url: str, path: Path) -> None:
    """Copy the file at ``url`` to a local path, piece by piece."""
    filesystem, name = _remote(url)
    patiently(lambda: filesystem.get_file(name, str(path)), url)


def listing(url: str) -> dict[str, int]:
    """Bytes of every file below a folder or URL, by its name relative to there; none where there is nothing."""
    path = local_path(url)
    if path is not None:
        return {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    filesystem, name = _remote(url)
    filesystem.invalidate_cache()  # what other processes have written since is to be seen
    try:
        found = patiently(lambda: filesystem.find(name, detail=True), url)
    except FileNotFoundError:
        return {}
    root = name.strip("/")
    return {one.strip("/").removeprefix(root).strip("/"): int(about["size"]) for one, about in found.items()}


def upload(path: Path, url: str) -> None:
    """Copy a local file to a remote URL, where it is whole or absent."""
    filesystem, name = _remote(url)
    patiently(lambda: filesystem.put_file(str(path), name), url)


def write(url: str, content: bytes) -> None:
    """Write a small file, whole or absent; a local folder is made where there is none."""
    path = local_path(url)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        return
    filesystem, name = _remote(url)
    patiently(lambda: filesystem.pipe_file(name, content), url)


def remove(url: str) -> None:
    """Remove a file, if it is there."""
    path = local_path(url)
    if path is not None:
        path.unlink(missing_ok=True)
        return
    filesystem, name = _remote(url)
    if patiently(lambda: filesystem.exists(name), url):
        patiently(lambda: filesystem.rm_file(name), url)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a local file aside, flush it to the disk and rename it, so that it is whole or absent.

    On a shared folder another node may write the same one at the same time, under the same process id.
    """
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def sync_folder(path: Path) -> None:
    """Make the renames inside a local folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def absent(url: str) -> ShardError:
    """What to say of a file that the manifest lists and that is not there."""
    return ShardError(f"{url}: no such file; the manifest lists it: copy it back or write the data set again")


@contextmanager
def naming(url: str) -> Iterator[None]:
    """What goes wrong with a local file names it, but for its absence, which means what only the caller knows.

    A ShardError only for what stays as it is, an OSError for what may pass, such as a disk that hangs.
    """
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except OSError as error:
        kind = ShardError if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)) else OSError
        raise kind(f"{url}: cannot be read: {error}; check the address and its permissions") from error
