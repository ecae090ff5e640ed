"""Seconds of comparing two models on 5,000 images, and how often a promotion would have been wrong.

The trials are of simulated models on new images each time. Their errors differ, but both find an object that is hard for
the one hard as well.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from pipeline.comparison.compare import Comparison
from pipeline.comparison.promote import refuse_loss
from pipeline.errors import RegistryError
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.evaluation.kept import from_bytes, keep, to_bytes
from shards.dataset.manifest import Manifest, load_manifest
from shards.score.coco_eval import score_detections
from shards.score.detections import Detections
from shards.score.difference import Change, difference
from tests.bench.scoring import ANNOTATIONS, IMAGES, QUERIES, detections
from tests.bench.simulated import write_simulated
from tests.support.labelled import labelled

Row = dict[str, Any]
_TRIALS, _TRIAL_IMAGES, _CLASSES = 100, 500, 20
_NOISE = {"the same model, other noise": 0.1, "worse by 2 AP": 0.1068}
"""Noise in the boxes of the second model; the first has 0.1, and 0.0034 more costs a point of AP."""


def comparing(device: str, rounds: int) -> list[Row]:
    """Measure a comparison, and the file that it reads."""
    title = f"comparing {IMAGES} images x {QUERIES} detections"
    with tempfile.TemporaryDirectory() as folder:
        manifest = load_manifest(write_simulated(Path(folder), IMAGES, ANNOTATIONS))
        first = _of_single_precision(detections(manifest))
        second = _of_single_precision(replace(first, boxes_xywh=first.boxes_xywh * 1.002))
        scored = Evaluation(score_detections(manifest, first), first, np.arange(manifest.images))
        content = to_bytes(keep(manifest, scored))
        print(f"{title:45} {len(content) / 1e6:.1f} MB kept", flush=True)
        works: dict[str, Callable[[], object]] = {
            "all figures, 1,000 draws": lambda: difference(manifest, [first], [second]),
            "AP, AP50, AP75 and classes": lambda: difference(manifest, [first], [second], sizes=False),
            "writing the file": lambda: (Path(folder) / "kept").write_bytes(to_bytes(keep(manifest, scored))),
            "reading it": lambda: from_bytes((Path(folder) / "kept").read_bytes(), "file"),
        }
        return [_row(title, side, [_timed(work) for _ in range(rounds)]) for side, work in works.items()]


def promotion(device: str, rounds: int) -> list[Row]:
    """Count promotions of simulated models, one per trial, by the rule of `detr promote`."""
    rows = []
    for side, noise in _NOISE.items():
        changes, promoted = [], 0
        for trial in range(_TRIALS):
            manifest = simulated_data(_TRIAL_IMAGES, trial)
            before = simulated_model(manifest, 3 * trial, 3 * trial + 1)
            after = simulated_model(manifest, 3 * trial, 3 * trial + 2, noise)
            found = difference(manifest, [before], [after], sizes=False, seed=trial)
            changes.append(found.deciding)
            try:
                refuse_loss(Comparison(("before",), ("after",), "simulated", "", "", found.deciding.name, found))
                promoted += 1
            except RegistryError:
                pass
        rows.append(_trials_row(side, changes, promoted))
    return rows


def _trials_row(side: str, changes: list[Change], promoted: int) -> Row:
    mean = statistics.fmean(change.difference for change in changes)
    row = {
        "case": f"{_TRIALS} promotions, {_TRIAL_IMAGES} images",
        "side": side,
        "promoted": promoted,
        "found worse": sum(change.high < 0 for change in changes),
        "mean change": mean,
        "deviation": statistics.stdev(change.difference for change in changes),
        "mean interval": statistics.fmean(change.high - change.low for change in changes),
        "intervals that hold the mean": sum(change.low <= mean <= change.high for change in changes),
    }
    print(
        "  ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()
        )
    )
    return row


def simulated_data(images: int, seed: int) -> Manifest:
    """Return a data set of rare and frequent classes and of objects of all sizes."""
    rng = np.random.default_rng(seed)
    shares = 1 / np.arange(1, _CLASSES + 1)
    objects = []
    for _ in range(images):
        count = min(1 + rng.poisson(4), 15)
        sides = np.exp(rng.uniform(np.log(12), np.log(200), (count, 2)))
        boxes = np.concatenate([rng.uniform(0, 400 - sides), sides], axis=1)
        labels = rng.choice(_CLASSES, count, p=shares / shares.sum())
        objects.append([(int(label), *box) for label, box in zip(labels, boxes.tolist(), strict=True)])
    return labelled(objects, _CLASSES)


def simulated_model(manifest: Manifest, shared: int, own: int, noise: float = 0.1) -> Detections:
    """Return detections of a model; with the same `shared` the same objects and images are hard for several."""
    index = manifest.index()
    objects, ids = index.annotations, index.images["image_id"].astype(np.int64)
    rng = np.random.default_rng([shared, 0])
    hard = rng.normal(0, 1, len(ids))[objects["image"]] + rng.normal(0, 1, len(objects))
    rng = np.random.default_rng([own, 1])
    hard = (0.7 * hard + rng.normal(0, 0.8, len(objects))) / np.sqrt(2 * 0.49 + 0.64)  # of variance 1
    spread = objects["bbox"][:, [2, 3, 2, 3]] * (noise * np.exp(-0.5 * hard))[:, None]
    boxes = objects["bbox"] + rng.normal(0, 1, (len(objects), 4)) * spread
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 1)
    scores = 1 / (1 + np.exp(-(1.2 * hard + 1 + rng.normal(0, 1, len(objects)))))
    wrong = rng.random(len(objects)) < 0.1
    labels = np.where(wrong, rng.integers(0, _CLASSES, len(objects)), objects["label"]).astype(np.int64)
    seen = norm.cdf(hard) > 0.2
    found = Detections(ids[objects["image"][seen]], labels[seen], scores[seen].astype(np.float32), boxes[seen])
    count = 20 * len(ids)
    corners, sides = rng.uniform(0, 250, (count, 2)), rng.uniform(10, 150, (count, 2))
    noise_scores = rng.beta(0.6, 6, count).astype(np.float32)
    lone = Detections(
        np.repeat(ids, 20), rng.integers(0, _CLASSES, count), noise_scores, np.concatenate([corners, sides], axis=1)
    )
    return Detections.concatenate([found, lone])


def _of_single_precision(found: Detections) -> Detections:
    """Return the detections with boxes as a model gives them: from corners in single precision."""
    corners = found.boxes_xywh.copy()
    corners[:, 2:] += corners[:, :2]
    corners = corners.astype(np.float32).astype(np.float64)
    return replace(found, boxes_xywh=np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1))


def _timed(work: Callable[[], Any]) -> tuple[float, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu_start


def _row(title: str, side: str, times: list[tuple[float, float]]) -> Row:
    """Return medians of seconds and of CPU seconds; the latter feel other load of the machine less."""
    seconds, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"{title:45} {side:28} median {seconds:8.2f} s, CPU {cpu_s:8.2f} s", flush=True)
    return {"case": title, "side": side, "median_s": seconds, "cpu_s": cpu_s}
