"""Seconds to describe data of COCO's size and to compare it with validation data, from the index alone."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.display.contents import contents_columns, contents_picture
from shards.dataset.contents import contents, warning_lines
from shards.dataset.manifest import load_manifest
from tests.bench.simulated import COCO_ANNOTATIONS, COCO_IMAGES, write_simulated

Row = dict[str, Any]


def describing(device: str, rounds: int) -> list[Row]:
    """Measure counts and comparison, and the same with table and chart."""
    title = f"contents of {COCO_IMAGES:,} images, {COCO_ANNOTATIONS:,} annotations"
    spent: dict[str, list[float]] = {"counts and comparison": [], "table and chart": []}
    with tempfile.TemporaryDirectory() as folder:
        train = load_manifest(write_simulated(Path(folder) / "train"))
        val = load_manifest(write_simulated(Path(folder) / "val", 5000, 36_335))
        for _ in range(rounds + 1):  # the first maps the index and imports matplotlib
            start = time.perf_counter()
            found = contents(train), contents(val)
            lines = warning_lines(*found)
            middle = time.perf_counter()
            contents_columns(*found)
            contents_picture(*found)
            spent["counts and comparison"].append(middle - start)
            spent["table and chart"].append(time.perf_counter() - middle)
    rows = []
    for side, times in spent.items():
        seconds = statistics.median(times[1:])
        print(f"{title:45} {side:24} median {seconds:.3f} s, the first time {times[0]:.3f} s", flush=True)
        rows.append({"case": title, "side": side, "median_s": seconds, "first_s": times[0], "warnings": len(lines)})
    return rows
