"""Compare the reader and the stock pipeline with webdataset, which shares no code with the reader."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from shards.config import CacheConfig, ReadConfig, WriteConfig
from shards.dataset.manifest import load_manifest
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader
from shards.read.stock import open_webdataset, verify_stock
from shards.write.writer import write_coco
from tests.support.real_data import COCO_TINY
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)

ORACLE = """
import hashlib, json, sys
import webdataset
from torch.utils.data import DataLoader

webdataset.utils.enforce_security = True

def sample(members):
    entry = members["json"]
    truth = [thing for thing in entry["annotations"] if not thing["iscrowd"]]
    pixels = hashlib.sha256(members["jpg"].tobytes()).hexdigest()
    return entry["image"]["id"], members["jpg"].shape, pixels, [[*thing["bbox"], thing["category_id"]] for thing in truth]

if __name__ == "__main__":
    samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode("rgb8").map(sample)
    print(json.dumps(list(DataLoader(samples, batch_size=None, num_workers=2))))
"""


def test_reader_delivers_what_a_plain_webdataset_loader_delivers(tmp_path):
    annotations = COCO_TINY / "annotations" / "instances_train2017.json"
    manifest = write_coco(COCO_TINY / "train2017", annotations, tmp_path / "out", WriteConfig(samples_per_shard=20))
    script = tmp_path / "oracle.py"  # a file, so that its workers can import it
    script.write_text(ORACLE)
    urls = [str(tmp_path / "out" / shard.name) for shard in manifest.shards]
    done = subprocess.run([sys.executable, script, *urls], stdout=subprocess.PIPE, check=True)
    expected = {image_id: rest for image_id, *rest in json.loads(done.stdout)}

    ids = [category.id for category in manifest.categories]
    plan = plan_epoch(manifest, seed=1, epoch=0, batch_size=8, epochs=1)
    delivered = [
        sample
        for batch in open_loader(
            manifest, plan, transform=lambda sample: sample, collate=list, config=ReadConfig(threads=2)
        )
        for sample in batch
    ]
    assert len(delivered) == len(expected) == 80
    for sample in delivered:
        shape, pixels, truth = expected.pop(sample.image_id)
        assert list(sample.image.shape) == shape
        assert hashlib.sha256(sample.image.tobytes()).hexdigest() == pixels
        corners = np.array([[x, y, x + w, y + h] for x, y, w, h, _ in truth]).reshape(-1, 4)
        np.testing.assert_array_equal(sample.boxes_xyxy, corners.astype(np.float32))
        assert [ids[label] for label in sample.labels] == [category for *_, category in truth]
    assert not expected


def test_stock_pipeline_reads_coco_tiny_as_indexed(tmp_path):
    annotations = COCO_TINY / "annotations" / "instances_val2017.json"
    manifest = write_coco(COCO_TINY / "val2017", annotations, tmp_path / "out", WriteConfig(samples_per_shard=20))
    report = verify_stock(tmp_path / "out")
    assert (report.problems, report.images) == ((), manifest.images)
    samples = [sample["json"] for sample in open_webdataset(tmp_path / "out").decode("rgb8")]
    assert [entry["image"]["id"] for entry in samples] == manifest.index().images["image_id"].tolist()

    record = manifest.index().images[30]
    path = tmp_path / "out" / manifest.shards[int(record["shard"])].name
    content = bytearray(path.read_bytes())
    content[int(record["offset"]) + 1000] ^= 1
    path.write_bytes(content)
    (problem,) = verify_stock(tmp_path / "out").problems
    assert f"such as image {record['image_id']}:" in problem


def test_stock_pipeline_reads_from_s3(tmp_path, tiny_data, monkeypatch):
    server = S3Server(tmp_path)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()  # of another test's server
    try:
        url = server.put(Path(tiny_data.train), "tiny")
        images = sum(1 for _ in open_webdataset(url, CacheConfig(folder="off")))
        assert verify_stock(url).ok
    finally:
        server.stop()
    assert images == load_manifest(tiny_data.train).images
