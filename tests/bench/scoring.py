"""Seconds of scoring 5,000 images with 100 detections each, by hotcoco and by pycocotools, and of explaining the score.

Images, sizes and boxes are those of COCO, repeated; detections are columns, as an evaluation has them, and their
conversion to each scorer's input counts.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shards.dataset.manifest import Manifest, load_manifest
from shards.score.coco_eval import score_detections
from shards.score.detections import Detections
from tests.bench.simulated import write_simulated

Row = dict[str, Any]
IMAGES, ANNOTATIONS, QUERIES = 5000, 36_335, 100  # of val2017 (crowds left out), and of a DETR


def scoring(device: str, rounds: int) -> list[Row]:
    """Measure both scorers in one run, pycocotools in one round because it takes a minute."""
    title = f"scoring {IMAGES} images x {QUERIES} detections"
    with tempfile.TemporaryDirectory() as folder:
        manifest = load_manifest(write_simulated(Path(folder), IMAGES, ANNOTATIONS))
        found = detections(manifest)
        manifest.index().rows_of(found.image_ids)  # the index is mapped before a run evaluates
        reference = _timed(lambda: score_detections(manifest, found, scorer="pycocotools"))
        rows = []
        for side, times, score in (
            ("hotcoco", *_rounds(lambda: score_detections(manifest, found), rounds)),
            ("pycocotools", [reference[0]], reference[1]),
        ):
            equal = score == reference[1]
            median = statistics.median(times)
            rows.append({"case": title, "side": side, "median_s": median, "speed_ratio": reference[0] / median})
            print(
                f"{title:45} {side:22} median {median:8.2f} s, AP {score.metrics['AP']:.4f}, all figures "
                f"{'equal' if equal else 'DIFFERENT'}, {reference[0] / median:.1f} times as fast",
                flush=True,
            )
    return rows


def detections(manifest: Manifest, seed: int = 0) -> Detections:
    """Return 100 detections per image: a shifted one of most objects, often with a high score, and random ones."""
    rng = np.random.default_rng(seed)
    index, count = manifest.index(), manifest.images * QUERIES
    images = np.repeat(np.arange(manifest.images), QUERIES)
    sizes = np.stack([index.images["width"], index.images["height"]], axis=1)[images]
    corners = rng.uniform(0, 0.8, (count, 2)) * sizes
    boxes = np.concatenate([corners, (sizes - corners) * rng.uniform(0.02, 1, (count, 2))], axis=1)
    labels, scores = rng.integers(0, manifest.num_classes, count), rng.beta(0.3, 4, count)
    objects = index.annotations[(index.annotations["iscrowd"] == 0) & (rng.random(len(index.annotations)) < 0.8)]
    slots = np.arange(len(objects)) - np.searchsorted(objects["image"], objects["image"])
    objects, slots = objects[slots < QUERIES], slots[slots < QUERIES]
    at = objects["image"].astype(np.int64) * QUERIES + slots
    sides = objects["bbox"][:, [2, 3, 2, 3]]
    boxes[at] = np.maximum(objects["bbox"] + rng.normal(0, 0.08, (len(at), 4)) * sides, 0)
    labels[at] = np.where(rng.random(len(at)) < 0.15, labels[at], objects["label"])
    scores[at] = rng.beta(4, 2, len(at))
    return Detections(index.images["image_id"][images].astype(np.int64), labels, scores.astype(np.float32), boxes)


def _rounds(work: Callable[[], Any], rounds: int) -> tuple[list[float], Any]:
    work()
    timed = [_timed(work) for _ in range(rounds)]
    return [seconds for seconds, _ in timed], timed[-1][1]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result
