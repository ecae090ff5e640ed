"""The oracle: a stock torch DataLoader over the plain webdataset library delivers what this reader delivers.

It cannot resume, divides shards and not samples, and is slower, but it shares no code with the reader.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shards.plan import plan_epoch
from shards.read import ReadConfig, open_loader
from shards.write import WriteConfig, write_coco

COCO_TINY = Path(os.environ.get("DETR_COCO_TINY", Path(__file__).parents[2] / "../shared/data/coco-tiny"))
pytestmark = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)

ORACLE = """
import hashlib, json, sys
import webdataset
from torch.utils.data import DataLoader

webdataset.utils.enforce_security = True

def sample(parts):
    entry = parts["json"]
    truth = [one for one in entry["annotations"] if not one["iscrowd"]]
    pixels = hashlib.sha256(parts["jpg"].tobytes()).hexdigest()
    return entry["image"]["id"], parts["jpg"].shape, pixels, [[*one["bbox"], one["category_id"]] for one in truth]

if __name__ == "__main__":
    samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False).decode("rgb8").map(sample)
    print(json.dumps([one for one in DataLoader(samples, batch_size=None, num_workers=2)]))
"""


def test_the_stock_loader_and_this_reader_deliver_the_same(tmp_path):
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
