"""Images per second, memory per image and model FLOPs utilisation of R50, on batches that do not repeat."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from detr.batch import Batch, Target, collate, normalise
from detr.compute import Precision
from detr.config import TransformConfig
from detr.geometry import draw_geometry
from detr.model import build_model
from tests.bench import cases, peer
from tests.bench.cases import Options, Work
from tests.bench.throughput import PEAKS, SIZES
from tests.bench.timing import PeakMemory, side_by_side
from tests.gpu.results import Results
from tests.gpu.work import Setting

_BATCHES = 8


@dataclass(frozen=True)
class Side:
    """Code and options; `options` is None for the original."""

    options: Options | None
    precision: Precision = "fp32"
    multiple: int = 1


_SIDES = {
    "original": Side(None),
    "original, bf16": Side(None, "bf16"),
    "ours, fp32": Side(Options()),
    "ours, bf16": Side(Options(precision="bf16")),
    "ours, bf16, compiled": Side(Options(precision="bf16", compile=True), multiple=128),
}


def run(results: Results, setting: Setting) -> None:
    for images in (2,) if setting.tiny else (8, 16):
        results.attempt(f"batches of {images}", lambda images=images: _compare(results, setting, images))


def _compare(results: Results, setting: Setting, images: int) -> None:
    names = [name for name, side in _SIDES.items() if _runs(side, setting, images)]
    works, kept = {}, {}
    for name in names:
        before = _allocated(setting)
        work = _work(_SIDES[name], setting, images)
        try:
            work()  # allocates the gradients and the optimizer's state
        except Exception as error:
            results.put(f"{name}, batches of {images}", error=f"{type(error).__name__}: {error}"[:400])
            continue
        works[name], kept[name] = work, _allocated(setting) - before
    rounds = 1 if setting.tiny else 3
    timings = side_by_side(works, rounds=rounds, calls=1 if setting.tiny else _BATCHES, device=setting.device)
    flops = _flops(setting, images)
    reference = timings.get("original", timings["ours, fp32"])
    for name, work in works.items():
        seconds, memory = timings[name].median_s, float("nan")
        if setting.cuda:
            others = _allocated(setting) - kept[name]
            peak = PeakMemory(setting.device)
            for _ in range(_BATCHES):
                work()
            memory = (peak.bytes() - others) / images / 2**30
        results.put(
            f"{name}, batches of {images}",
            images_per_s=images / seconds,
            ratio=reference.ratio_to(timings[name]),
            gib_per_image=memory,
            mfu=flops / seconds / next((peak for known, peak in PEAKS.items() if known in setting.name), float("nan")),
        )


def _runs(side: Side, setting: Setting, images: int) -> bool:
    if side.options is None:
        return not peer.missing() and not setting.tiny
    # Compiling each shape takes most of the limit, so it is done once.
    return not side.options.compile or (images == 8 and setting.cuda)


def _allocated(setting: Setting) -> int:
    return torch.cuda.memory_allocated() if setting.cuda else 0


def _work(side: Side, setting: Setting, images: int) -> Work:
    batches = _batches(setting, images, side.multiple)
    if side.options:
        step = cases.training_ours(side.options, setting.device, setting.model)
    else:
        step = cases.training_peer(side.precision, setting.device)
    number = 0

    def work() -> object:
        nonlocal number
        number += 1
        drawn, batch = batches[number % len(batches)]
        return step(drawn, batch.padding, batch.targets)

    return work


def _batches(setting: Setting, images: int, multiple: int = 1) -> list[tuple[Tensor, Batch]]:
    """Return normalised images on the device with their batch."""
    batches = []
    for samples in drawn_samples(setting, images, 2 if setting.tiny else _BATCHES):
        batch = collate(samples, multiple).to(torch.device(setting.device))
        batches.append((normalise(batch, TransformConfig()), batch))
    return batches


def drawn_samples(setting: Setting, images: int, batches: int) -> Iterator[list[tuple[Tensor, Target]]]:
    """Yield batches of random pixels of COCO's sizes after the paper's augmentation, with as many boxes as COCO's."""
    draw, config = np.random.default_rng(0), TransformConfig()
    if setting.tiny:
        config = TransformConfig(train_scales=(64,), max_size=96, crop=False)
    for number in range(batches):
        samples = []
        for row in range(images):
            image_id = number * images + row
            width, height = list(SIZES)[draw.choice(len(SIZES), p=list(SIZES.values()))]
            h, w = draw_geometry(0, 0, image_id, width, height, config).size
            target = cases.targets(1, int(draw.geometric(1 / 8.3)) - 1)[0]
            image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8)
            samples.append((image, Target(target.boxes, target.labels, image_id, (height, width))))
        samples.sort(key=lambda sample: sample[0].shape[2] / sample[0].shape[1])
        yield samples


def _flops(setting: Setting, images: int) -> float:
    """Return the operations of the forward and backward pass of a mean step, on canvases without rounding."""
    model = build_model(replace(setting.model, dropout=0.0), cases.CLASSES).to(setting.device).train()
    total, batches = 0, _batches(setting, images)[:2]
    for drawn, batch in batches:
        with FlopCounterMode(display=False) as counter:
            outputs = model(drawn, batch.padding)
            (outputs.logits.sum() + outputs.boxes.sum()).backward()
        total += counter.get_total_flops()
    return total / len(batches)
