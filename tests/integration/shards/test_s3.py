"""Data sets on a real S3 server on loopback, which checks credentials, stops and starts again."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shards.config import CacheConfig, ReadConfig
from shards.dataset.manifest import Manifest, load_manifest
from shards.dataset.verify import check_sizes
from shards.errors import ShardError
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader, read_samples
from shards.read.sample import Sample
from shards.store import retry, storage
from tests.support.s3_server import SECRET, S3Server
from tests.support.tiny_data import TinyData

IMAGES = 12


@pytest.fixture(scope="module")
def local(tiny_data: TinyData) -> Manifest:
    """Return a data set of 12 images of 64 px in 3 shards."""
    return load_manifest(tiny_data.train)


@pytest.fixture
def s3(local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """Yield the server with the data set at s3://sets/coco, in the environment that its clients need."""
    server = S3Server(tmp_path)
    server.put(Path(local.url), "coco")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()  # of another test's server
    yield server
    server.stop()


def remote(folder: Path | str) -> Manifest:
    return load_manifest("s3://sets/coco", CacheConfig(str(folder)))


def same(ours: Manifest, theirs: Manifest, config: ReadConfig | None = None) -> bool:
    rows = np.random.default_rng(0).permutation(IMAGES)
    pairs = zip(read_samples(ours, rows, config), read_samples(theirs, rows), strict=True)
    return all(np.array_equal(a.image, b.image) and np.array_equal(a.boxes_xyxy, b.boxes_xyxy) for a, b in pairs)


def test_samples_equal_the_local_ones_and_each_shard_is_fetched_once(
    s3: S3Server, local: Manifest, tmp_path: Path
) -> None:
    for _ in range(2):
        assert same(remote(tmp_path / "kept"), local, ReadConfig(threads=4, prefetch=8))
    assert Counter(s3.gets(".tar")) == {f"coco/{shard.name}": 1 for shard in local.shards}
    assert Counter(s3.gets(".npy")) == {"coco/index/images.npy": 1, "coco/index/annotations.npy": 1}
    check_sizes(remote(tmp_path / "kept"))
    assert storage.read_range(f"s3://sets/coco/{local.shards[0].name}", local.shards[0].bytes, 10) == b""


def test_sample_without_cache_is_one_request_masks_included(s3: S3Server, local: Manifest) -> None:
    assert same(remote("off"), local, ReadConfig(threads=4, prefetch=8))
    assert len(s3.gets(".tar")) == IMAGES
    masks = [sample.masks for sample in read_samples(remote("off"), range(IMAGES), ReadConfig(masks=True))]
    assert all(mask is not None and mask.any() for mask in masks)
    assert len(s3.gets(".tar")) == 2 * IMAGES


# Code of each process: read all samples through the cache, in an order of its own.
READ = """
import sys
import numpy as np
from shards.config import CacheConfig
from shards.dataset.manifest import load_manifest
from shards.config import ReadConfig
from shards.read.loader import read_samples
manifest = load_manifest("s3://sets/coco", CacheConfig(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
rows = np.random.default_rng(int(sys.argv[2])).permutation(manifest.images)
print(sum(int(sample.image.sum()) for sample in read_samples(manifest, rows, ReadConfig(threads=3, prefetch=6))))
"""


def test_two_processes_on_an_empty_cache_fetch_every_shard_once(s3: S3Server, local: Manifest, tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(tmp_path / "kept"), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    sums = {int(process.communicate(timeout=180)[0]) for process in processes}
    assert sums == {sum(int(sample.image.sum()) for sample in read_samples(local, range(IMAGES)))}
    assert Counter(s3.gets(".tar")) == {f"coco/{shard.name}": 1 for shard in local.shards}


def test_first_batch_after_a_resume_does_not_depend_on_the_position(s3: S3Server) -> None:
    manifest = remote("off")
    manifest.index()
    plan = plan_epoch(manifest, seed=1, epoch=0, batch_size=2, epochs=1)
    asked = []
    for step in (0, 3, 5):
        before = len(s3.gets(".tar"))
        loader = open_loader(
            manifest, plan, start_step=step, transform=_row, collate=list, config=ReadConfig(threads=0)
        )
        assert next(loader) == plan.step(step)[0].tolist()
        loader.close()
        asked.append(len(s3.gets(".tar")) - before)
    assert asked == [2, 2, 2]


def _row(sample: Sample) -> int:
    return sample.row


@pytest.mark.parametrize("wrong", ["secret", "key", "none"])
def test_wrong_credentials_give_one_clear_line_at_once(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    if wrong == "secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-" + SECRET)
    elif wrong == "key":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    else:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    with pytest.raises(
        ShardError, match=r"^s3://sets/coco/manifest.json: access denied \(.*AWS_ACCESS_KEY_ID"
    ) as caught:
        remote(tmp_path / "kept")
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    assert "attempt" not in caplog.text  # at once, without a retry


@pytest.mark.parametrize("cache", ["kept", "off"])
def test_interrupted_store_costs_only_time(
    s3: S3Server, local: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.1)
    manifest = remote(tmp_path / cache if cache == "kept" else cache)
    samples = read_samples(manifest, range(IMAGES), ReadConfig(threads=2, prefetch=2))
    found = [next(samples).row for _ in range(2)]
    s3.stop()
    back = threading.Timer(0.4, s3.start)
    back.start()
    found += [sample.row for sample in samples]
    back.join()
    assert found == list(range(IMAGES))


def test_unavailable_store_gives_one_clear_line(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(retry, "LONGEST_WAIT_S", 0.02)
    samples = read_samples(remote(tmp_path / "kept"), range(IMAGES), ReadConfig(threads=2, prefetch=2))
    next(samples)
    s3.stop()
    with pytest.raises(
        retry.StoreError, match=r"^s3://sets/coco/shard-\d+.tar: no good answer in 8 attempts"
    ) as caught:
        list(samples)
    assert "\n" not in str(caught.value)


def test_clients_do_not_retry_by_themselves(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default botocore and s3fs retry five times each, for minutes."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    s3.stop()
    connections = []
    with socket.create_server(("127.0.0.1", s3.port)) as server:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connections.append(1)
                    connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(retry.StoreError):
            storage.read_range("s3://sets/coco/shard-000000.tar", 0, 10)
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert len(connections) <= 2 * retry.ATTEMPTS  # aiohttp retries once if a connection was closed


def test_damage_on_the_store_gives_one_clear_line(s3: S3Server, local: Manifest, tmp_path: Path) -> None:
    folder = s3.root / "sets" / "coco"
    (folder / "shard-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"s3://sets/coco/shard-000001.tar: no such file; the manifest lists it"):
        list(read_samples(remote(tmp_path / "kept"), range(IMAGES)))
    with pytest.raises(ShardError, match=r"s3://sets/coco/shard-000001.tar: no such file"):
        list(read_samples(remote("off"), range(IMAGES)))
    content = (Path(local.url) / "shard-000001.tar").read_bytes()
    (folder / "shard-000001.tar").write_bytes(content[:-2000])
    with pytest.raises(ShardError, match=r"image \d+ in shard-000001.tar: .*truncated: got \d+ bytes, expected \d+"):
        list(read_samples(remote(tmp_path / "kept"), range(IMAGES)))
    images = local.index().images
    (folder / "shard-000001.tar").write_bytes(content[: images["offset"][images["shard"] == 1].max() + 100])
    with pytest.raises(
        ShardError, match=r"image \d+ in shard-000001.tar: got \d+ of \d+ bytes, the shard is truncated"
    ):
        list(read_samples(remote("off"), range(IMAGES)))
