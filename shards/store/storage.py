"""Files at local paths and remote URLs, behind the same functions.

Local files are accessed directly (a ranged read is one `pread`); every other `scheme://` goes through fsspec, with
retries. fsspec keeps one file system per store and process, and its event loop runs in a thread of its own: any thread
may read, but the process must not fork afterwards. Credentials come from the environment. They are not allowed in an
address, because logs, job specs and MLflow show it.
"""

import errno
import math
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import fsspec

from shards.errors import ShardError
from shards.store.retry import StoreError, with_retries

_COMMON = ("s3", "gs", "gcs", "az", "abfs", "oci", "oss", "hdfs", "sftp", "smb", "webdav", "hf", "https", "file")


def local_path(url: str) -> Path | None:
    """Return the path that a plain path or a `file://` URL names, or None for a remote URL."""
    if url.startswith("file://"):
        return Path(url[len("file://") :])
    return None if "://" in url else Path(url)


def _remote(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a remote URL and the name in it; raise `ShardError` if fsspec has none."""
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")):
        configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        # Some servers send the checksum of the whole object with a range of it, which the client would then refuse.
        checked = {"response_checksum_validation": "when_required"}
        options["config_kwargs"] = {**checked, **configured, "retries": {"total_max_attempts": 1}}
    try:
        filesystem, name = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ShardError(f"{url}: cannot be reached: {error}; expected a path or a URL that fsspec can open") from None
    if hasattr(filesystem, "retries"):
        filesystem.retries = 1  # s3fs and gcsfs would otherwise retry by themselves, for minutes
    return filesystem, name


def refuse_secret(url: str) -> None:
    """Raise `ShardError` if an address contains a password or a signature; the message does not repeat it."""
    scheme, separator, rest = url.partition("://")
    # A password may contain slashes, so search up to the last @; a port is digits up to the first slash.
    if separator and (re.match(r"[^/@]*:(?!\d*(/|$)).*@", rest) or re.search(r"\?.*=", rest)):
        raise ShardError(
            f"the {scheme}:// address holds a password or a signature, which logs and MLflow would show; expected none: "
            "give credentials in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for S3) or in fsspec's "
            "configuration (FSSPEC_... variables)"
        )


def refuse_unknown(url: str) -> None:
    """Raise `ShardError` for an address that nothing here can open: another scheme, or a known one without its slashes.

    The second would be a folder called `s3:`. The message has the nearest scheme that is known.
    """
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)", url)
    if not found:
        return
    scheme, slashes = found.groups()
    known = sorted(fsspec.available_protocols())
    if scheme in known and len(slashes) < 2:
        raise ShardError(f"{url} is neither a folder nor a URL; expected {scheme}://{url[found.end() :]}")
    if scheme not in known and len(slashes) > 1:
        nearest = get_close_matches(scheme.lower(), _COMMON, n=1, cutoff=0.5)
        meant = f"did you mean {nearest[0]}://{url[found.end() :]}" if nearest else "such as s3://bucket/runs"
        raise ShardError(
            f"{url}: no store is called {scheme}://; expected a folder or a URL that fsspec opens: {meant}?"
        )


def absolute(url: str) -> str:
    """Return a local path as an absolute one, or a remote URL without trailing slashes; refuse secrets in it."""
    refuse_secret(url)
    path = local_path(url)
    return url.rstrip("/") if path is None else str(path.absolute())


def join(url: str, *names: str) -> str:
    """Return `url` with `names` appended, each after one slash."""
    return "/".join([url.rstrip("/"), *names])


def exists(url: str) -> bool:
    """Return true if a file or folder exists at `url`."""
    path = local_path(url)
    if path is not None:
        return path.exists()
    filesystem, name = _remote(url)
    return bool(with_retries(lambda: filesystem.exists(name), url))


def size(url: str) -> int:
    """Return the bytes of the file at `url`; raise `FileNotFoundError` if it is absent."""
    path = local_path(url)
    if path is not None:
        return path.stat().st_size
    filesystem, name = _remote(url)
    return int(with_retries(lambda: filesystem.size(name), url))


def age_s(url: str) -> float:
    """Return the seconds since a remote file was written, by the clocks of store and machine; infinite if unknown.

    Unknown is the age of a file that has been deleted meanwhile, and of any file in a store whose fsspec file system keeps
    no times, which it answers with `NotImplementedError`.
    """
    filesystem, name = _remote(url)
    try:
        return time.time() - float(with_retries(lambda: filesystem.modified(name), url).timestamp())
    except (FileNotFoundError, NotImplementedError):
        return math.inf


def read(url: str) -> bytes:
    """Return the content of a file; raise `FileNotFoundError` if it is absent."""
    path = local_path(url)
    if path is not None:
        return path.read_bytes()
    filesystem, name = _remote(url)
    return bytes(with_retries(lambda: filesystem.cat_file(name), url))


def read_range(url: str, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset`, fewer only at the file's end; raise `FileNotFoundError` if it is absent."""
    path = local_path(url)
    if path is not None:
        return with_retries(lambda: _local_range(path, offset, length), url)
    filesystem, name = _remote(url)

    def request() -> bytes:
        try:
            return bytes(filesystem.cat_file(name, start=offset, end=offset + length))
        except OSError as error:
            # S3's response to a range that starts after the end of the file.
            if error.errno == errno.EINVAL and offset >= int(filesystem.size(name)):
                return b""
            raise

    return with_retries(request, url)


def _local_range(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), length, offset)


def download(url: str, path: Path) -> None:
    """Copy the file at a remote URL to a local path, in chunks."""
    filesystem, name = _remote(url)
    with_retries(lambda: filesystem.get_file(name, str(path)), url)


def listing(url: str) -> dict[str, int]:
    """Return the size in bytes of each file below a folder or URL, by relative name; empty if nothing is there."""
    path = local_path(url)
    if path is not None:
        return {str(file.relative_to(path)): file.stat().st_size for file in path.rglob("*") if file.is_file()}
    filesystem, name = _remote(url)
    filesystem.invalidate_cache()  # to see what other processes have written since
    try:
        found = with_retries(lambda: filesystem.find(name, detail=True), url)
    except FileNotFoundError:
        return {}
    root = name.strip("/")
    return {file.strip("/").removeprefix(root).strip("/"): int(info["size"]) for file, info in found.items()}


def upload(path: Path, url: str) -> None:
    """Copy a local file to a remote URL atomically."""
    filesystem, name = _remote(url)
    with_retries(lambda: filesystem.put_file(str(path), name), url)


def write(url: str, content: bytes) -> None:
    """Write a small file atomically, creating its local folder if necessary."""
    path = local_path(url)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)
        return
    filesystem, name = _remote(url)
    with_retries(lambda: filesystem.pipe_file(name, content), url)


def remove(url: str) -> None:
    """Remove a file if it exists."""
    path = local_path(url)
    if path is not None:
        path.unlink(missing_ok=True)
        return
    filesystem, name = _remote(url)
    if with_retries(lambda: filesystem.exists(name), url):
        with_retries(lambda: filesystem.rm_file(name), url)


def write_atomic(path: Path, content: bytes) -> None:
    """Write a local file so that it is complete or absent, even after a crash or a power failure (`atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give the block a temporary path beside `path`; flush what it wrote to the disk and rename it to `path`.

    If the block raises, the temporary file is removed and `path` stays as it was. The rename itself is durable after
    `sync_folder`. Two nodes with a shared folder may write the same file with the same process id, so the temporary
    name contains the host name; threads of one process must not write the same file at once.
    """
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(path: Path) -> None:
    """Make the renames inside a local folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def missing_file_error(url: str) -> ShardError:
    """Return the error for a file that the manifest lists and that does not exist."""
    return ShardError(f"{url}: no such file; the manifest lists it: copy it back or write the data set again")


@contextmanager
def error_context(url: str) -> Iterator[None]:
    """Add `url` to the message of an error that reading a local file raises in the block.

    Raise `ShardError` for lasting errors (permissions, not a file) and `OSError` for those that may pass, such as of a
    disk that does not respond. `FileNotFoundError` passes unchanged: only the caller knows what it means.
    """
    try:
        yield
    except (FileNotFoundError, StoreError):
        raise
    except OSError as error:
        kind = ShardError if isinstance(error, (PermissionError, IsADirectoryError, NotADirectoryError)) else OSError
        raise kind(f"{url}: cannot be read: {error}; check the address and its permissions") from error
