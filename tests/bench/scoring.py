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
from PIL import Image

from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.training.explaining import report_explanation
from shards.config import WriteConfig
from shards.dataset.manifest import Manifest, load_manifest
from shards.masks.rle import decode_masks, encode_masks
from shards.read.segmentations import true_runs
from shards.score.coco_eval import score_detections
from shards.score.detections import Detections
from shards.score.diagnosis import diagnose
from shards.write.writer import write_coco
from tests.bench.simulated import write_simulated
from tests.support.real_data import COCO_TINY
from tests.support.tracker import MemoryTracker

Row = dict[str, Any]
IMAGES, ANNOTATIONS, QUERIES = 5000, 36_335, 100  # of val2017 (crowds left out), and of a DETR


def scoring(device: str, rounds: int) -> list[Row]:
    """Measure both scorers in one run, pycocotools in one round because it takes a minute."""
    title = f"scoring {IMAGES} images x {QUERIES} detections"
    with tempfile.TemporaryDirectory() as folder:
        manifest, found = _problem(Path(folder))
        manifest.index().rows_of(found.image_ids)  # the index is mapped before a run evaluates
        reference, expected = _timed(lambda: score_detections(manifest, found, scorer="pycocotools"))
        score_detections(manifest, found)
        timed = [_timed(lambda: score_detections(manifest, found)) for _ in range(rounds)]
    rows = [
        _row(title, "hotcoco", [times for times, _ in timed]),
        _row(title, "pycocotools", [reference]),
    ]
    equal = all(score == expected for _, score in timed)
    print(
        f"{title:45} {'all figures equal' if equal else 'FIGURES DIFFER'}, AP {expected.metrics['AP']:.4f}", flush=True
    )
    return rows


def masks(device: str, rounds: int) -> list[Row]:
    """Measure both scorers on masks, of 80 real images with 100 detections each: moved masks of the truth."""
    title = f"scoring masks, 80 images x {QUERIES} detections"
    with tempfile.TemporaryDirectory() as folder:
        truth = COCO_TINY / "annotations" / "instances_val2017.json"
        manifest = write_coco(COCO_TINY / "val2017", truth, Path(folder) / "real", WriteConfig())
        found = _moved_masks(manifest)
        reference, expected = _timed(lambda: score_detections(manifest, found, scorer="pycocotools"))
        timed = [_timed(lambda: score_detections(manifest, found)) for _ in range(rounds)]
        runs, _ = _timed(lambda: true_runs(manifest, np.arange(manifest.images)))
    rows = [
        _row(title, "hotcoco", [times for times, _ in timed]),
        _row(title, "pycocotools", [reference]),
        _row(title, "of both: reading the truth", [runs]),
    ]
    equal = all(score == expected for _, score in timed)
    figures = f"AP {expected.metrics['AP']:.4f}, of masks {expected.metrics['mask_AP']:.4f}"
    print(f"{title:45} {'all figures equal' if equal else 'FIGURES DIFFER'}, {figures}", flush=True)
    return rows


def _moved_masks(manifest: Manifest) -> Detections:
    """Return 100 detections per image, each with the mask of one of its objects, moved by up to 8 pixels."""
    rng = np.random.default_rng(0)
    index, by_image = manifest.index(), []
    for row in range(manifest.images):
        image, objects = index.images[row], index.annotations_of(row)
        if not len(objects):
            continue
        known = decode_masks(true_runs(manifest, np.array([row])), int(image["height"]), int(image["width"]))
        chosen, steps = rng.integers(0, len(objects), QUERIES), rng.integers(-8, 9, (QUERIES, 2))
        moved = [np.roll(known[number], step, (0, 1)) for number, step in zip(chosen, steps.tolist(), strict=True)]
        boxes = objects["bbox"][chosen] + np.concatenate([steps[:, ::-1], np.zeros((QUERIES, 2))], axis=1)
        ids, labels = np.full(QUERIES, image["image_id"]), objects["label"][chosen].astype(np.int64)
        scores = rng.random(QUERIES).astype(np.float32)
        by_image.append(Detections(ids, labels, scores, boxes, encode_masks(np.stack(moved))))
    return Detections.concatenate(by_image)


def explaining(device: str, rounds: int) -> list[Row]:
    """Measure what an evaluation adds to say why its score is what it is, pictures included."""
    title = f"explaining {IMAGES} images x {QUERIES} detections"
    with tempfile.TemporaryDirectory() as folder:
        manifest, found = _problem(Path(folder))
        evaluation = Evaluation(score_detections(manifest, found), found, np.arange(manifest.images))
        tracker = _Files(Path(folder))
        works: dict[str, Callable[[], object]] = {
            "kinds of errors to suspects": lambda: diagnose(manifest, found),
            "with tables and pictures": lambda: report_explanation(tracker, manifest, evaluation, 1),
        }
        rows = []
        for side, work in works.items():
            work()
            rows.append(_row(title, side, [_timed(work)[0] for _ in range(rounds)]))
    return rows


def _problem(folder: Path) -> tuple[Manifest, Detections]:
    manifest = load_manifest(write_simulated(folder, IMAGES, ANNOTATIONS))
    return manifest, detections(manifest)


def _row(title: str, side: str, times: list[tuple[float, float]]) -> Row:
    """Return medians of seconds and of CPU seconds; the latter feel other load of the machine less."""
    seconds, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{title:45} {side:28} median {seconds:8.2f} s, CPU {cpu_s:8.2f} s", flush=True)
    return {"case": title, "side": side, "median_s": seconds, "cpu_s": cpu_s}


class _Files(MemoryTracker):
    """Tracker that writes pictures to files, as the spool does."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def picture(self, key: str, image: Image.Image, step: int) -> None:
        image.save(self._folder / f"{key.replace('/', '-')}.png")


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


def _timed(work: Callable[[], Any]) -> tuple[tuple[float, float], Any]:
    """Return seconds and CPU seconds of a call, and its result."""
    start, cpu_start = time.perf_counter(), time.process_time()
    result = work()
    return (time.perf_counter() - start, time.process_time() - cpu_start), result
