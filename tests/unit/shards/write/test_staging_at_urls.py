"""Staging of data sets at URLs."""

import json
import tempfile
from datetime import timedelta

import fsspec
import msgspec
import pytest

from shards.config import WriteConfig
from shards.dataset.manifest import load_manifest
from shards.dataset.verify import verify
from shards.errors import ShardError
from shards.source.defects import SourceError
from shards.store import storage
from shards.write import shard as shard_writer
from shards.write import staging, writer
from shards.write.writer import write_coco

URL = "memory://bucket/coco"
CONFIG = WriteConfig(samples_per_shard=2, name="instances")


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def write_remote(coco, config: WriteConfig = CONFIG):
    return write_coco(coco.images, coco.annotations, URL, config)


@pytest.fixture
def local(coco):
    return coco.write(samples_per_shard=2)


def content(url: str) -> dict[str, bytes]:
    return {name: storage.read(storage.join(url, name)) for name in storage.listing(url)}


def test_url_and_folder_get_the_same_bytes(coco, local, bucket):
    manifest = write_remote(coco)
    assert content(URL) == content(local.url)
    assert manifest.digest == local.digest
    assert load_manifest(URL).url == URL
    assert verify(URL).ok


def test_a_rerun_leaves_a_finished_remote_data_set_as_it_is(coco, local, bucket, monkeypatch):
    first = write_remote(coco)
    monkeypatch.setattr(storage, "upload", lambda *_: pytest.fail("wrote again"))
    assert write_remote(coco) == first


def test_manifest_is_last_and_a_stopped_upload_continues(coco, local, bucket, monkeypatch):
    uploaded, original = [], storage.upload

    def upload(path, url):
        if len(uploaded) == 2:
            raise KeyboardInterrupt
        uploaded.append(url)
        original(path, url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "upload", upload)
        with pytest.raises(KeyboardInterrupt):
            write_remote(coco)
    with pytest.raises(ShardError, match=r"no manifest.json here"):
        load_manifest(URL)
    again = []
    monkeypatch.setattr(storage, "upload", lambda path, url: again.append(url) or original(path, url))
    write_remote(coco)
    assert (len(uploaded), len(again)) == (2, 2)
    assert content(URL) == content(local.url)


def test_an_uploaded_shard_of_another_size_is_written_again(coco, local, bucket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_remote(coco)
    bucket.pipe_file("/bucket/coco/shard-000001.tar", b"half of")
    write_remote(coco)
    assert content(URL) == content(local.url)


def test_unfinished_upload_of_another_input_is_replaced_when_old(coco, local, bucket, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_rest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_remote(coco, WriteConfig(samples_per_shard=1))
    before = content(URL)
    with pytest.raises(ShardError, match=r"was being written there \d s ago; .* try again in 1[12]\d s"):
        write_remote(coco)
    assert content(URL) == before
    bucket.store["/bucket/coco/.partial/key"].modified -= timedelta(seconds=500)  # the notes are still young
    with pytest.raises(ShardError, match="was being written there"):
        write_remote(coco)
    for file in bucket.store.values():
        file.modified -= timedelta(seconds=500)
    write_remote(coco)
    assert content(URL) == content(local.url)


@pytest.mark.parametrize("when", ["write_shard", "read_image", "upload", "_check_there"])
def test_superseded_writer_does_not_touch_the_other_data_set(coco, bucket, monkeypatch, when):
    """A writer without activity is taken for dead: between shards, while it makes or uploads one, or at its end."""
    monkeypatch.setattr(staging, "YOUNG_S", 0.0)
    where, call = {
        "write_shard": (writer, 1),
        "read_image": (shard_writer, 3),
        "upload": (storage, 3),
        "_check_there": (writer, 1),
    }[when]
    original, calls = getattr(where, when), []

    def overtaken(*args):
        result = original(*args)
        calls.append(args)
        if len(calls) == call:
            write_remote(coco, WriteConfig(samples_per_shard=3, name="instances"))
        return result

    coco.annotations.write_text(json.dumps(coco.data))
    monkeypatch.setattr(where, when, overtaken)
    with pytest.raises(ShardError, match="another process has started or finished a data set there"):
        write_remote(coco)
    assert [shard.samples for shard in load_manifest(URL).shards] == [3, 3, 1]
    assert verify(URL).problems == ()
    assert not any(name.startswith(".partial") for name in storage.listing(URL))


def test_defective_source_keeps_the_data_set_of_another_writer(coco, bucket, monkeypatch):
    original = writer.make_report

    def overtaken(policy, *args):
        if policy == "fail":
            write_remote(coco, WriteConfig(on_defect="quarantine"))
        return original(policy, *args)

    monkeypatch.setattr(staging, "YOUNG_S", 0.0)
    monkeypatch.setattr(writer, "make_report", overtaken)
    coco.annotations.write_text(json.dumps(coco.data))
    (coco.images / "picture 4.jpg").write_bytes(b"")
    with pytest.raises(SourceError):
        write_remote(coco)
    assert verify(URL).ok


def test_folder_with_other_content_is_refused(coco, local, bucket):
    bucket.pipe_file("/bucket/coco/thesis.txt", b"dear")
    with pytest.raises(ShardError, match="is not empty and holds no data set"):
        write_remote(coco)
    assert content(URL) == {"thesis.txt": b"dear"}
    bucket.rm_file("/bucket/coco/thesis.txt")
    write_remote(coco)
    before = content(URL)
    with pytest.raises(ShardError, match="instances, but written with --samples-per-shard 2, not 3"):
        write_remote(coco, WriteConfig(samples_per_shard=3, name="instances"))
    assert content(URL) == before


def test_defective_source_leaves_only_its_report(coco, local, bucket):
    path = coco.images / "picture 4.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(SourceError, match=r"memory://bucket/coco\.report\.json"):
        write_remote(coco)
    assert storage.listing(URL) == {}
    report = msgspec.json.decode(storage.read(f"{URL}.report.json"))
    assert [defect["image_id"] for defect in report["defects"] if defect["kind"] == "truncated"] == [128]


def test_empty_shard_is_not_uploaded(coco, local, bucket):
    path = coco.images / "picture 4.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    manifest = write_remote(coco, WriteConfig(samples_per_shard=1, on_defect="quarantine"))
    tars = sorted(name for name in storage.listing(URL) if name.endswith(".tar"))
    assert tars == [shard.name for shard in manifest.shards]
    assert len(tars) == 6


def test_images_may_lie_at_a_url(coco, local, bucket):
    for path in coco.images.iterdir():
        bucket.pipe_file(f"/pictures/train/{path.name}", path.read_bytes())
    manifest = write_coco("memory://pictures/train", coco.annotations, coco.root / "out2", CONFIG)
    assert manifest.digest == local.digest
    bucket.rm_file("/pictures/train/picture 2.jpg")
    with pytest.raises(SourceError, match=r"image 114 \(picture 2.jpg\): no such file"):
        write_coco("memory://pictures/train", coco.annotations, coco.root / "out3", CONFIG)
    with pytest.raises(ShardError, match="memory://pictures/elsewhere: holds no files"):
        write_coco("memory://pictures/elsewhere", coco.annotations, coco.root / "out3", CONFIG)


def test_worker_that_does_not_see_the_folder_reports_it(coco, bucket):
    """Other processes cannot see files in the memory of this one."""
    coco.write("unused")
    with pytest.raises(
        ShardError, match="expected images and --out to be visible from every process and node"
    ) as caught:
        write_remote(coco, WriteConfig(2, workers=1))
    assert "\n" not in str(caught.value)


def test_missing_bucket_is_not_reported_as_full(coco, local, bucket, monkeypatch):
    def fails(url: str, content: bytes) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(storage, "write", fails)
    with pytest.raises(ShardError, match="bucket does not exist; make the bucket first, or correct the address"):
        write_remote(coco)


def test_killed_writer_leaves_no_temporary_files(coco, local, bucket, monkeypatch):
    """Look for files during an upload, where a kill would leave them."""
    uploads, upload = [], storage.upload
    folder = coco.root / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(storage, "upload", lambda *where: uploads.append(list(folder.iterdir())) or upload(*where))
    write_remote(coco)
    assert uploads == [[]] * 4
    assert content(URL) == content(local.url)
