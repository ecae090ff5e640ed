"""Panoptic post-processing beside the original's steps, and panoptic quality beside hotcoco's, on images of COCO's sizes.

Predictions are ellipses of things before bands of stuff, each band predicted by two queries, so that stuff is merged and most
images need a second pass, as those of a trained model do.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detr.panoptic import PanopticResult, panoptic
from detr.variant import Outputs
from shards.panoptic.segments import TrueSegments
from shards.score.panoptic_folders import score_folders
from shards.score.panoptic_quality import count, quality
from tests.bench.timing import PeakMemory, Work, side_by_side
from tests.support.panoptic_figures import plain_panoptic, write_panoptic_files

Row = dict[str, Any]
QUERIES, CLASSES, SIZE, ORIGINAL = 100, 133, (800, 1066), (480, 640)
STUFF = [label >= 80 for label in range(CLASSES)]
GRID = (200, 267)
IMAGES = 200


def segments(device: str, rounds: int) -> list[Row]:
    """Measure segments from predictions, of an image and of a batch of two, with few and with many kept queries."""
    rows = []
    for things, bands in ((6, 3), (20, 5)):
        title = f"segments, {things + 2 * bands} queries kept, 800 x 1066 to 480 x 640"
        for images in (1, 2):
            outputs = _on(predictions(images, things, bands), device)
            works: dict[str, Work] = {
                "ours": partial(_ours, outputs),
                "original's steps": partial(_plain, outputs),
            }
            timings = side_by_side(works, rounds=rounds, device=device, clock=_clock(device))
            reference = timings["original's steps"]
            for side, timing in timings.items():
                milliseconds, ratio = 1e3 * timing.median_s / images, reference.ratio_to(timing)
                rows.append({"case": title, "images": images, "side": side, "ms": milliseconds, "speed_ratio": ratio})
                print(
                    f"{title:50} batch of {images} {side:18} {milliseconds:7.1f} ms per image, {ratio:.1f} times as fast",
                    flush=True,
                )
    return rows


def _clock(device: str) -> Callable[[], float]:
    """Return the clock of CPU seconds, or of seconds where a device works meanwhile."""
    return time.process_time if device == "cpu" else time.perf_counter


def scored(device: str, rounds: int) -> list[Row]:
    """Measure panoptic quality of images, and the memory of post-processing and counting as images become more."""
    things = [not stuff for stuff in STUFF]
    results = [result for seed in range(8) for result in _ours(predictions(1, 6, 3, seed))]
    known = [_truth(results[number - 1]) for number in range(len(results))]
    pairs = [
        (truth, (result.indices.numpy(), [segment.label for segment in result.segments]))
        for truth, result in zip(known, results, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = write_panoptic_files(Path(folder), pairs, things)
        works: dict[str, Work] = {
            "arrays": lambda: quality([count(truth, *prediction) for truth, prediction in pairs], things),
            "hotcoco, files": lambda: score_folders(*files),
        }
        timings = side_by_side(works, rounds=rounds, device="cpu", clock=time.process_time)
    title = "panoptic quality, 480 x 640, per image"
    rows: list[Row] = []
    for side, timing in timings.items():
        rows.append({"case": title, "side": side, "ms": 1e3 * timing.median_s / len(pairs)})
        print(f"{title:60} {side:15} {rows[-1]['ms']:7.2f} ms", flush=True)
    return rows + _memory(device, things, known)


def _memory(device: str, things: list[bool], known: list[TrueSegments]) -> list[Row]:
    outputs = _on(predictions(1, 6, 3), device)
    counts, rows = [], []
    for images in (20, IMAGES):
        peak = PeakMemory(device)
        while len(counts) < images:
            result = _ours(outputs)[0]
            counts.append(count(known[0], result.indices.numpy(), [segment.label for segment in result.segments]))
        quality(counts, things)
        rows.append({"case": "panoptic validation", "side": f"{images} images", "peak_bytes": peak.bytes()})
        print(f"{'panoptic validation':60} {images} images, peak {rows[-1]['peak_bytes'] / 2**20:.1f} MiB", flush=True)
    return rows


def predictions(images: int, things: int, bands: int, seed: int = 0) -> Outputs:
    """Return predictions of `things` ellipses and of `bands` of stuff, which two queries of a class predict each."""
    rng = np.random.default_rng(seed)
    logits = 0.5 * rng.standard_normal((images, QUERIES, CLASSES + 1))
    masks = 0.2 * rng.standard_normal((images, QUERIES, *GRID))
    logits[..., CLASSES] += 8
    y, x = (np.arange(GRID[0])[:, None] + 0.5) / GRID[0], (np.arange(GRID[1]) + 0.5) / GRID[1]
    for image in range(images):
        chosen = rng.choice(QUERIES, things + 2 * bands, replace=False)
        labels = np.concatenate(
            [rng.integers(0, 80, things), np.repeat(rng.choice(range(80, CLASSES), bands, False), 2)]
        )
        logits[image, chosen, CLASSES] -= 8
        logits[image, chosen, labels] += 11
        for number, query in enumerate(chosen):
            cy, cx = rng.uniform(0.1, 0.9, 2)
            ry, rx = rng.uniform(0.05, 0.25, 2) if number < things else (1.5 / bands, 2.0)
            gain = 8 if number < things else 3
            masks[image, query] += gain * np.maximum(1 - ((y - cy) / ry) ** 2 - ((x - cx) / rx) ** 2, -3)
    return Outputs(
        torch.from_numpy(logits.astype(np.float32)),
        torch.zeros(images, QUERIES, 4),
        masks=torch.from_numpy(masks.astype(np.float32)),
    )


def _truth(result: PanopticResult) -> TrueSegments:
    """Return another image's prediction as the truth."""
    labels = np.array([segment.label for segment in result.segments], np.int64)
    areas = np.array([segment.area for segment in result.segments], np.float64)
    ids = np.arange(1, len(labels) + 1, dtype=np.uint32) * 4099
    pixels = np.append(ids, 0).astype(np.uint32)[result.indices.numpy()]
    return TrueSegments(pixels, ids, labels, areas, np.zeros(len(labels), np.bool_))


def _ours(outputs: Outputs) -> list[PanopticResult]:
    images = len(outputs.logits)
    return panoptic(outputs, [ORIGINAL] * images, [SIZE] * images, None, STUFF)


def _plain(outputs: Outputs) -> None:
    assert outputs.masks is not None
    for logits, masks in zip(outputs.logits, outputs.masks, strict=True):
        plain_panoptic(logits, masks, SIZE, ORIGINAL, STUFF)


def _on(outputs: Outputs, device: str) -> Outputs:
    assert outputs.masks is not None
    return Outputs(outputs.logits.to(device), outputs.boxes, masks=outputs.masks.to(device))
