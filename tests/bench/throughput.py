"""Training images per second on a GPU, on batches like those of COCO with the paper's augmentation.

Sizes are drawn by the augmentation's own rule from the sizes COCO's images mostly have, boxes per image from a
distribution with COCO's mean of 7.3. Every side gets the same batches, already on the device.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detr.batch import Batch, Target, collate, normalise
from detr.compute import Precision
from detr.config import ModelConfig, TransformConfig
from detr.geometry import draw_geometry
from detr.model import build_model
from tests.bench import cases, peer
from tests.bench.cases import Options, Work
from tests.bench.timing import PeakMemory, side_by_side

IMAGES = 8  # per step: the paper's 64 on one node of eight GPUs
BATCHES = 8
# Share of COCO's training images by size, rounded; the others are similar to one of these.
SIZES = {(640, 480): 0.55, (480, 640): 0.18, (640, 427): 0.15, (427, 640): 0.06, (500, 375): 0.06}
# Dense bf16 peak of the tensor cores, operations per second, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
Row = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A side of the comparison: the code and its options."""

    name: str
    options: Options | None
    """None: the original's code."""
    precision: Precision = "fp32"
    multiple: int = 1


SIDES = (
    Side("ours, fp32", Options()),
    Side("ours, bf16, channels first", Options(precision="bf16", channels_last=False)),
    Side("ours, bf16", Options(precision="bf16")),
    Side("ours, bf16, compiled", Options(precision="bf16", compile=True), multiple=128),
    Side("original", None),
    Side("original, bf16", None, precision="bf16"),
)


def train(device: str, rounds: int) -> list[Row]:
    """Measure images per second, memory per image, model-FLOPs utilisation and the largest kernels of R50."""
    sides = [side for side in SIDES if side.options or not peer.missing()]
    works: dict[str, Work] = {}
    kept: dict[str, int] = {}
    for side in sides:
        before = torch.cuda.memory_allocated()
        works[side.name] = _work(side, device)
        works[side.name]()  # allocates the gradients and the optimizer's state
        kept[side.name] = torch.cuda.memory_allocated() - before
    timings = side_by_side(works, rounds=rounds, calls=BATCHES, device=device)
    flops = _flops(device)
    reference = timings["original" if "original" in timings else sides[0].name]
    rows = []
    for side in sides:
        seconds = timings[side.name].median_s
        of_others = torch.cuda.memory_allocated() - kept[side.name]
        peak = PeakMemory(device)
        for _ in range(BATCHES):
            works[side.name]()
        row: Row = {
            "case": f"training, R50, {IMAGES} images of the 800 px recipe",
            "side": side.name,
            "images_per_s": IMAGES / seconds,
            "ratio": reference.ratio_to(timings[side.name]),
            "bytes_per_image": (peak.bytes() - of_others) / IMAGES,
            "model_flops_per_image": flops / IMAGES,
            "mfu": _utilisation(flops / seconds),
        }
        rows.append(row)
        print(
            f"{row['case']:45} {side.name:27} {row['images_per_s']:7.1f} images/s x{row['ratio']:.2f}  "
            f"{row['bytes_per_image'] / 2**30:.2f} GiB/image  MFU {row['mfu']:.1%}",
            flush=True,
        )
    print(profile(works["ours, bf16"], device))
    return rows


def profile(work: Work, device: str) -> str:
    """Return a table of the ten largest kernels of a few steps."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(BATCHES):
            work()
        torch.cuda.synchronize()
    return profiler.key_averages().table(  # type: ignore[no-any-return]
        sort_by=f"self_{device}_time_total", row_limit=10, max_name_column_width=60
    )


def _work(side: Side, device: str) -> Work:
    """Return a function that takes one step, on the next batch each time."""
    batches = _batches(device, side.multiple)
    options = side.options
    step = cases.training_ours(options, device) if options else cases.training_peer(side.precision, device)
    position = 0

    def work() -> object:
        nonlocal position
        position += 1
        images, batch = batches[position % BATCHES]
        return step(images, batch.padding, batch.targets)

    return work


def _batches(device: str, multiple: int = 1) -> list[tuple[Tensor, Batch]]:
    """Return normalised images on the device with their batch; the same for the same `multiple`."""
    draw, config, batches = np.random.default_rng(0), TransformConfig(), []
    for number in range(BATCHES):
        samples = []
        for row in range(IMAGES):
            image_id = number * IMAGES + row
            width, height = list(SIZES)[draw.choice(len(SIZES), p=list(SIZES.values()))]
            h, w = draw_geometry(0, 0, image_id, width, height, config).size
            boxes = int(draw.geometric(1 / 8.3)) - 1
            target = cases.targets(1, boxes)[0]
            image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
            samples.append((image, Target(target.boxes, target.labels, image_id, (height, width))))
        samples.sort(key=lambda sample: sample[0].shape[2] / sample[0].shape[1])
        batch = collate(samples, multiple).to(device)
        batches.append((normalise(batch, config), batch))
    return batches


def _flops(device: str) -> float:
    """Return the operations of the forward and backward pass of a mean step, on canvases without rounding."""
    model = build_model(ModelConfig(dropout=0.0), cases.CLASSES).to(device).train()
    total = 0
    for images, batch in _batches(device):
        with FlopCounterMode(display=False) as counter:
            outputs = model(images, batch.padding)
            (outputs.logits.sum() + outputs.boxes.sum()).backward()
        total += counter.get_total_flops()
    return total / BATCHES


def _utilisation(flops_per_s: float) -> float:
    """Return the share of the device's dense bf16 peak; NaN for a device whose peak is not listed."""
    name = torch.cuda.get_device_name()
    peak = next((value for known, value in PEAKS.items() if known in name), float("nan"))
    return flops_per_s / peak
