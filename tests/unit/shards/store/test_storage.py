import errno
import os
import threading

import fsspec
import pytest

from shards.dataset.manifest import load_manifest
from shards.errors import ShardError
from shards.store import range_reader, retry, storage
from shards.store.range_reader import RangeReader


@pytest.fixture
def waits(monkeypatch):
    """Record the waits between attempts instead of waiting."""
    waited = []
    monkeypatch.setattr(retry.time, "sleep", waited.append)
    return waited


class NoCredentialsError(Exception):
    """Error with the name of botocore's."""


def failing(*errors):
    """Return a request that raises these errors one after the other, then succeeds."""
    remaining = list(errors)

    def request():
        if remaining:
            raise remaining.pop(0)
        return b"at last"

    return request


def test_transient_errors_are_retried_with_growing_waits(waits, caplog):
    away = (ConnectionError("gone"), TimeoutError(), OSError(errno.EBUSY, "SlowDown"), RuntimeError("client"))
    assert retry.with_retries(failing(*away), "s3://b/x") == b"at last"
    bounds = [0.5, 1, 2, 4]
    assert len(waits) == 4
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert "s3://b/x: gone; attempt 2 of 8" in caplog.messages[0]


def test_a_permanent_outage_raises_one_line_after_a_bounded_time(waits):
    with pytest.raises(
        retry.StoreError, match=r"^s3://b/x: no good answer in 8 attempts; .* try again \(gone\)$"
    ) as caught:
        retry.with_retries(failing(*[ConnectionError("gone\nfar away")] * 99), "s3://b/x")
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, ShardError)  # a later attempt may succeed
    assert len(waits) == 7
    assert sum(waits) < 46


@pytest.mark.parametrize(
    "error",
    [
        PermissionError("SignatureDoesNotMatch"),
        NoCredentialsError("Unable to locate credentials"),
        OSError(errno.EINVAL, "InvalidBucketName"),
        IsADirectoryError("a folder"),
    ],
)
def test_lasting_errors_are_not_retried(waits, error):
    with pytest.raises(ShardError, match=r"^s3://b/x: ") as caught:
        retry.with_retries(failing(error), "s3://b/x")
    assert "\n" not in str(caught.value)
    assert not waits


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_ENDPOINT_URL_S3", "nonsense"),
        ("AWS_ENDPOINT_URL_S3", "http://localhost:notaport"),
        ("AWS_DEFAULT_REGION", "a b/c"),
        ("AWS_PROFILE", "nobody"),
    ],
)
def test_a_wrong_client_setting_raises_one_line_without_retry(waits, monkeypatch, tmp_path, variable, value):
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv(variable, value)
    clients = fsspec.get_filesystem_class("s3")
    clients.clear_instance_cache()
    try:
        with pytest.raises(ShardError, match=rf"^s3://bucket/set/manifest.json: .*{value}.*{variable}") as caught:
            load_manifest("s3://bucket/set")
    finally:
        clients.clear_instance_cache()
    assert "\n" not in str(caught.value)
    assert not waits


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("x"), ValueError("ours"), TypeError("a mistake of ours"), MemoryError(), ShardError("y")],
)
def test_errors_that_are_not_of_the_store_pass_unchanged(waits, error):
    with pytest.raises(type(error)) as caught:
        retry.with_retries(failing(error), "s3://b/x")
    assert caught.value is error
    assert not waits


@pytest.mark.parametrize(
    "url",
    [
        "s3://KEY:hunter@bucket/set",
        "s3://KEY:hun/ter@bucket/set",
        "sftp://someone:hunter@host:22/set",
        "simplecache::ftp://someone:hunter@host/set",
        "https://host/set?X-Amz-Signature=hunter",
    ],
)
def test_a_url_with_a_secret_is_refused_without_showing_it(url):
    with pytest.raises(ShardError, match="holds a password or a signature") as caught:
        load_manifest(url)
    assert "hun" not in str(caught.value)
    assert "ter@" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://bucket/a:b@c", "sftp://host:22/x@y", "abfs://container@account/x", "/a:b@c/d"])
def test_a_url_without_a_secret_is_accepted(url):
    assert storage.absolute(url) == url


def test_remote_ranges_end_at_the_end_of_the_file():
    fsspec.filesystem("memory").pipe_file("/ranges/x", bytes(range(100)))
    assert storage.read_range("memory://ranges/x", 10, 3) == bytes([10, 11, 12])
    assert storage.read_range("memory://ranges/x", 98, 10) == bytes([98, 99])
    assert storage.read_range("memory://ranges/x", 100, 10) == b""
    with pytest.raises(FileNotFoundError):
        storage.read_range("memory://ranges/none", 0, 1)


def test_many_threads_can_read_a_remote_file():
    content = bytes(range(256)) * 40
    fsspec.filesystem("memory").pipe_file("/threads/x", content)
    files = RangeReader()
    wrong = []

    def read(start):
        for offset in range(start, start + 200):
            if files.read("memory://threads/x", offset, 50) != content[offset : offset + 50]:
                wrong.append(offset)

    threads = [threading.Thread(target=read, args=(100 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_nodes_can_write_the_same_file_at_once(tmp_path, monkeypatch):
    """Both processes have the same id."""
    real, hosts = os.fsync, []

    def fsync(descriptor):
        if not hosts:
            hosts.append("second")
            monkeypatch.setattr(storage.socket, "gethostname", lambda: "second")
            storage.write_atomic(tmp_path / "x", b"theirs")
            assert (tmp_path / "x").read_bytes() == b"theirs"
        real(descriptor)

    monkeypatch.setattr(storage.socket, "gethostname", lambda: "first")
    monkeypatch.setattr(storage.os, "fsync", fsync)
    storage.write_atomic(tmp_path / "x", b"ours")
    assert (tmp_path / "x").read_bytes() == b"ours"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_atomic_write_that_fails_leaves_the_file_unchanged(tmp_path):
    (tmp_path / "x").write_bytes(b"before")

    def write_half():
        with storage.atomic_path(tmp_path / "x") as temporary:
            temporary.write_bytes(b"half")
            raise KeyError("stop")

    with pytest.raises(KeyError):
        write_half()
    assert (tmp_path / "x").read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def failing_with(number):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    return fails


def test_a_transient_read_error_names_the_local_file(tmp_path, monkeypatch):
    path = tmp_path / "shard-000000.tar"
    path.write_bytes(b"x" * 10)
    files = RangeReader()
    for number in (errno.EIO, errno.ESTALE):  # of a disk and a file server: both may pass
        monkeypatch.setattr(range_reader.os, "pread", failing_with(number))
        with pytest.raises(OSError, match=rf"^{path}: cannot be read: .*{os.strerror(number)}") as caught:
            files.read(str(path), 0, 10)
        assert not isinstance(caught.value, ShardError)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTDIR])
def test_a_lasting_read_error_names_the_local_file(tmp_path, monkeypatch, number):
    (tmp_path / "shard").touch()
    monkeypatch.setattr(range_reader.os, "open", failing_with(number))
    with pytest.raises(ShardError, match=rf"^{tmp_path}/shard: cannot be read: .*{os.strerror(number)}"):
        RangeReader().read(str(tmp_path / "shard"), 0, 10)


def test_reading_a_folder_as_a_file_names_it(tmp_path):
    with pytest.raises(ShardError, match=rf"^{tmp_path}: cannot be read: .*Is a directory"):
        RangeReader().read(str(tmp_path), 0, 10)
