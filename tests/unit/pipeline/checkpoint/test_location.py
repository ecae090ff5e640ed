"""Locations of checkpoints: folders and URLs, checked before a run exists."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint import location
from pipeline.checkpoint.location import Location, Url, checkpoint_root
from pipeline.config import RunConfig
from pipeline.driver.preflight import check_storage, prepare
from pipeline.errors import RunConfigError
from shards.errors import ShardError
from shards.store import storage


def test_checkpoints_are_in_the_run_folder_or_below_the_store(tmp_path: Path) -> None:
    folder = tmp_path / "name-1"
    assert checkpoint_root("", folder) == folder
    assert (
        checkpoint_root("/mnt/kept", folder) == checkpoint_root("file:///mnt/kept", folder) == Path("/mnt/kept/name-1")
    )
    assert checkpoint_root("s3://bucket/runs/", folder) == Url("s3://bucket/runs/name-1")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("runs/x", Path("runs/x")),
        ("file:///mnt/runs", Path("/mnt/runs")),
        ("s3://bucket/runs/", Url("s3://bucket/runs")),
        ("a:b", Path("a:b")),
    ],
)
def test_a_location_is_a_folder_or_a_url(url: str, expected: Location) -> None:
    assert location.location(url) == expected


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("s3:/bucket/runs", "s3://bucket/runs"),
        ("s3:bucket", "s3://bucket"),
        ("S3://bucket/runs", "s3://bucket/runs"),
        ("s4://bucket", "s3://bucket"),
        ("gc://bucket", "gcs://bucket"),
        ("nowhere://bucket", "such as s3://bucket/runs"),
    ],
)
def test_an_address_that_nothing_opens_is_no_folder(url: str, meant: str) -> None:
    with pytest.raises(ShardError, match=meant) as raised:
        location.location(url)
    assert str(raised.value).startswith(url)


def test_a_store_is_tried_before_a_run_exists(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stored(store: str) -> RunConfig:
        return replace(tiny_config, storage=str(tmp_path), checkpoint=replace(tiny_config.checkpoint, store=store))

    with pytest.raises(RunConfigError, match=r"^checkpoint.store memory://bucket/runs is the memory of each process"):
        check_storage(stored("memory://bucket/runs"))
    with monkeypatch.context() as patch:
        kept: dict[str, bytes] = {}
        tried: list[str] = []
        patch.setattr(storage, "write", lambda url, content: (tried.append(url), kept.update({url: content})))
        patch.setattr(storage, "remove", kept.pop)
        check_storage(stored("s3://bucket/runs"))
        assert [url.rpartition("/")[0] for url in tried] == ["s3://bucket/runs"]
        assert kept == {}
    (tmp_path / "file").write_text("")
    with pytest.raises(RunConfigError, match=r"^checkpoint.store .*/file is a file; expected a folder"):
        check_storage(stored(str(tmp_path / "file")))
    with pytest.raises(
        RunConfigError, match=r"^checkpoint.store foo://bar: no store is called foo://; expected a folder or a URL"
    ):
        check_storage(stored("foo://bar"))
    with pytest.raises(
        RunConfigError, match=r"^checkpoint.store .*file/x cannot be written .*give another --checkpoint"
    ):
        check_storage(stored(str(tmp_path / "file" / "x")))

    def absent(*_: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(storage, "write", absent)
    with pytest.raises(RunConfigError, match=r"^checkpoint.store s3://bucket/runs cannot be written .*bucket does not"):
        location.check("s3://bucket/runs")
    monkeypatch.chdir(tmp_path)
    config, _ = prepare(stored("kept"), lambda _: None)
    assert config.checkpoint.store == str(tmp_path / "kept")
    with pytest.raises(ShardError, match="holds a password"):
        prepare(stored("s3://me:secret@host/runs"), lambda _: None)
    with pytest.raises(RunConfigError, match="holds a password"):
        check_storage(stored("s3://me:secret@host/runs"))
