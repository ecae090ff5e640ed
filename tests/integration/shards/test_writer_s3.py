"""Data sets written to a real S3 server on loopback by the real command, with worker processes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from shards.config import WriteConfig
from shards.dataset.verify import verify
from shards.write.writer import write_panoptic
from tests.support.panoptic_data import make_panoptic
from tests.support.s3_server import S3Server
from tests.support.tiny_data import TinyData


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server(tmp_path, written=True)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()  # of another test's server
    yield server
    server.stop()


def shard(tiny_data: TinyData, images: str, out: str) -> subprocess.CompletedProcess[str]:
    annotations = tiny_data.root / "coco" / "annotations" / "instances_train.json"
    options = ["--images", images, "--annotations", str(annotations), "--out", out, "--samples-per-shard", "5"]
    command = [sys.executable, "-m", "jobs.cli", "shard", "coco", *options, "--workers", "2"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_data_set_on_s3_has_the_bytes_of_a_local_one(s3: S3Server, tiny_data: TinyData) -> None:
    images = s3.put(tiny_data.root / "coco" / "train", "pictures")
    done = shard(tiny_data, images, "s3://sets/coco")
    assert (done.returncode, done.stderr) == (0, "")
    assert content(s3.root / "sets" / "coco") == content(Path(tiny_data.train))

    before = {path: path.stat().st_mtime_ns for path in (s3.root / "sets" / "coco").rglob("*")}
    again = shard(tiny_data, images, "s3://sets/coco")
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert {path: path.stat().st_mtime_ns for path in (s3.root / "sets" / "coco").rglob("*")} == before


def test_panoptic_data_are_read_from_s3_and_written_there(s3: S3Server, tmp_path: Path) -> None:
    source = make_panoptic(tmp_path / "panoptic")
    local = source.write()
    folders = s3.put(source.images, "pictures"), source.annotations, s3.put(source.segments, "pngs")
    remote = write_panoptic(*folders, "s3://sets/panoptic", WriteConfig())
    assert remote.digest == local.digest
    assert content(s3.root / "sets" / "panoptic") == content(Path(local.url))
    assert verify("s3://sets/panoptic").ok
    assert write_panoptic(*folders, "s3://sets/panoptic", WriteConfig()) == remote
