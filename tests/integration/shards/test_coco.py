"""Real COCO images: written, read by webdataset and by our loader, and scored like the original JSON."""

import base64
import contextlib
import copy
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.config import ReadConfig, WriteConfig
from shards.dataset.verify import verify
from shards.masks.rle import encode_masks
from shards.plan.epoch import plan_epoch
from shards.read.loader import open_loader, read_samples
from shards.score.coco_eval import MASK_METRICS, METRICS, Detections, coco_metrics
from shards.write.writer import write_coco
from tests.support.coco_results import coco_results
from tests.support.real_data import COCO_TINY

pytestmark = pytest.mark.skipif(
    not COCO_TINY.is_dir(), reason=f"no COCO images at {COCO_TINY}; set DETR_COCO_TINY to a folder of them"
)


STOCK_READER = """
import base64, json, sys, webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False)
print(json.dumps([
    {name: base64.b64encode(value.encode() if isinstance(value, str) else value).decode() for name, value in sample.items()}
    for sample in samples
]))
"""


class Split:
    def __init__(self, name: str, out: Path) -> None:
        self.images = COCO_TINY / f"{name}2017"
        self.annotations = COCO_TINY / "annotations" / f"instances_{name}2017.json"
        self.data = json.loads(self.annotations.read_bytes())
        self.out = out
        self.manifest = write_coco(self.images, self.annotations, out, WriteConfig(samples_per_shard=32))


@pytest.fixture(scope="module", params=["train", "val"])
def split(request, tmp_path_factory):
    return Split(request.param, tmp_path_factory.mktemp("coco") / request.param)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_manifest_has_the_counts_of_the_json(split):
    manifest = split.manifest
    assert (manifest.images, manifest.num_classes) == (80, 80)
    assert manifest.annotations == len(split.data["annotations"])
    assert [category.id for category in manifest.categories] == sorted(
        category["id"] for category in split.data["categories"]
    )
    assert manifest.categories[-1].id == 90
    assert manifest.index().annotations["iscrowd"].sum() == sum(
        annotation["iscrowd"] for annotation in split.data["annotations"]
    )
    assert verify(split.out).ok


def test_webdataset_alone_reads_every_sample_exactly(split):
    # In a process of its own: it imports nothing of ours, and webdataset leaves its files open, which warns.
    urls = sorted(str(path) for path in split.out.glob("*.tar"))
    done = subprocess.run([sys.executable, "-c", STOCK_READER, *urls], stdout=subprocess.PIPE, check=True)
    read = [{name: base64.b64decode(value) for name, value in sample.items()} for sample in json.loads(done.stdout)]
    samples = {sample["__key__"].decode(): sample for sample in read}
    assert len(read) == len(samples) == 80
    annotations = []
    for image in split.data["images"]:
        sample = samples[f"{image['id']:012d}"]
        assert sample["jpg"] == (split.images / image["file_name"]).read_bytes()
        entry = json.loads(sample["json"])
        assert entry["image"] == image
        for annotation, segmentation in zip(
            entry["annotations"], json.loads(sample.get("segmentation.json", b"[]")), strict=True
        ):
            annotations.append(annotation | {"segmentation": segmentation})
    by_id = {annotation["id"]: annotation for annotation in annotations}
    assert by_id == {annotation["id"]: annotation for annotation in split.data["annotations"]}
    assert len(annotations) == len(by_id)
    rest = json.loads((split.out / "source.json").read_bytes())
    assert rest == {key: value for key, value in split.data.items() if key not in ("images", "annotations")}


def test_bytes_depend_neither_on_the_run_nor_on_the_workers(split, tmp_path):
    write_coco(split.images, split.annotations, tmp_path / "again", WriteConfig(samples_per_shard=32, workers=3))
    assert digests(tmp_path / "again") == digests(split.out)


def test_epoch_over_three_ranks_decodes_images_as_pillow_does(split):
    plan = plan_epoch(split.manifest, seed=9, epoch=0, batch_size=16)
    samples = [
        sample
        for rank in range(3)
        for batch in open_loader(
            split.manifest,
            plan,
            rank=rank,
            world_size=3,
            transform=lambda sample: sample,
            collate=list,
            config=ReadConfig(threads=2, prefetch=2),
        )
        for sample in batch
    ]
    names = {image["id"]: image["file_name"] for image in split.data["images"]}
    assert sorted(sample.image_id for sample in samples) == sorted(names)
    labels = {category.id: label for label, category in enumerate(split.manifest.categories)}
    for sample in samples:
        with Image.open(split.images / names[sample.image_id]) as image:
            assert np.array_equal(sample.image, np.asarray(image.convert("RGB")))
        truth = [
            annotation
            for annotation in split.data["annotations"]
            if annotation["image_id"] == sample.image_id and not annotation["iscrowd"]
        ]
        assert sample.labels.tolist() == [labels[annotation["category_id"]] for annotation in truth]
        boxes = np.array([annotation["bbox"] for annotation in truth], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert np.array_equal(sample.boxes_xyxy, boxes.astype(np.float32))


def test_masks_equal_those_of_pycocotools_from_the_json(split):
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(split.annotations))
    count = 0
    for sample in read_samples(split.manifest, range(80), ReadConfig(threads=2, masks=True)):
        truth = [annotation for annotation in coco.imgToAnns[sample.image_id] if not annotation["iscrowd"]]
        assert sample.masks.shape == (len(truth), sample.height, sample.width)
        for mask, annotation in zip(sample.masks, truth, strict=True):
            assert np.array_equal(mask, coco.annToMask(annotation).astype(bool)), annotation["id"]
        count += len(truth)
    assert count == sum(not annotation["iscrowd"] for annotation in split.data["annotations"]) > 600


def test_mask_scores_equal_those_of_pycocotools_on_the_json(split):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(split.annotations))
    rng = np.random.default_rng(1)
    ids = {category.id: label for label, category in enumerate(split.manifest.categories)}
    truth = [annotation for annotation in split.data["annotations"] for _ in range(2)]
    # The truth is moved by a twentieth of its size; a fifth has another class, a tenth is empty.
    masks = np.empty(len(truth), object)
    for number, annotation in enumerate(truth):
        shift = np.rint(rng.normal(0, 0.05, 2) * annotation["bbox"][:1:-1]).astype(int)
        moved = np.roll(coco.annToMask(annotation), shift, (0, 1)) * (rng.random() < 0.9)
        masks[number] = encode_masks(moved.astype(bool)[None])[0]
    labels = np.array([ids[annotation["category_id"]] for annotation in truth])
    wrong = rng.random(len(truth)) < 0.2
    labels[wrong] = rng.integers(0, 80, wrong.sum())
    boxes = np.array([annotation["bbox"] for annotation in truth], np.float64)
    image_ids = np.array([annotation["image_id"] for annotation in truth], np.int64)
    detections = Detections(image_ids, labels, rng.random(len(truth)).astype(np.float32), boxes, masks)

    metrics = coco_metrics(split.manifest, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        results = json.loads(json.dumps(coco_results(split.manifest, detections)))
        reference = COCOeval(coco, coco.loadRes(results), "segm")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    found = [metrics[name] for name in MASK_METRICS]
    assert found == reference.stats.tolist()
    assert 0 < min(found) < max(found) < 1


def test_scores_equal_those_of_pycocotools_on_the_json(split):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    index = split.manifest.index()
    truth = np.repeat(index.annotations, 4)
    labels = truth["label"].astype(np.int64)
    wrong = rng.random(len(truth)) < 0.3
    labels[wrong] = rng.integers(0, 80, wrong.sum())
    boxes = np.abs(truth["bbox"] * rng.normal(1, 0.1, (len(truth), 4)))
    scores = rng.random(len(truth)).astype(np.float32)
    detections = Detections(index.images["image_id"][truth["image"]], labels, scores, boxes)

    metrics = coco_metrics(split.manifest, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(split.annotations))
        reference = COCOeval(coco, coco.loadRes(copy.deepcopy(coco_results(split.manifest, detections))), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    assert metrics == dict(zip(METRICS, reference.stats.tolist(), strict=True))
    assert min(metrics.values()) > 0
