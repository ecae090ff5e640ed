"""Deformable attention beside torch's `grid_sample` with all samples in memory, forward and backward, in time and memory."""

from functools import partial
from typing import Any

import torch

from detr.deformable.attention import Shapes, sample
from tests.bench.deformable import SHAPES, at_once, sampling_work
from tests.bench.timing import PeakMemory, side_by_side
from tests.gpu.results import Results
from tests.gpu.work import Setting

_CORES = {"all samples at once": at_once, "ours": sample}


def run(results: Results, setting: Setting) -> None:
    shapes: Shapes = ((8, 12), (4, 6), (2, 3), (1, 2)) if setting.tiny else SHAPES
    for images in (1,) if setting.tiny else (1, 4):
        results.attempt(f"{images} images", partial(_compare, results, setting, shapes, images))


def _compare(results: Results, setting: Setting, shapes: Shapes, images: int) -> None:
    cores: dict[str, Any] = dict(_CORES)
    if setting.cuda:
        cores["all samples at once, compiled"] = torch.compile(at_once, dynamic=False)
    works = {name: sampling_work(core, setting.device, shapes, images) for name, core in cores.items()}
    expected = works["all samples at once"]()
    timings = side_by_side(works, rounds=2 if setting.tiny else 5, calls=3, device=setting.device)
    for name, work in works.items():
        peak = float("nan")
        if setting.cuda:
            before = torch.cuda.memory_allocated()
            memory = PeakMemory(setting.device)
            work()
            peak = (memory.bytes() - before) / 2**20
        results.put(
            f"{name}, {images} image{'s' if images > 1 else ''} of {8 * shapes[0][0]}x{8 * shapes[0][1]}",
            ms=timings[name].median_s * 1e3,
            ratio=timings["all samples at once"].ratio_to(timings[name]),
            peak_mib=peak,
            worst=float((work() - expected).abs().max() / expected.abs().max()),
        )
