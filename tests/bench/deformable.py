"""Deformable attention beside the usual plain PyTorch, all samples of all levels at once; matching of 300 and 1,800 queries.

Peak memory is measured in separate processes, beyond that of their inputs.
"""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou

from detr.config import LossConfig
from detr.deformable.attention import sample
from detr.matcher import PackedTargets, focal_cost, match_layers, pack
from tests.bench.cases import CLASSES, LAYERS, targets
from tests.bench.timing import PeakMemory, Work, side_by_side

Row = dict[str, Any]
Core = Callable[[Tensor, Tensor, Tensor, tuple[tuple[int, int], ...]], Tensor]
SHAPES = ((100, 134), (50, 67), (25, 34), (13, 17))  # levels of an image of 800 x 1066
HEADS, WIDTH, POINTS = 8, 32, 4
LOSS = LossConfig(cost_class=2.0)


def at_once(value: Tensor, locations: Tensor, weights: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
    """Return what `sample` returns, with all samples in memory side by side."""
    batch, _, heads, width = value.shape
    queries = locations.shape[1]
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # [B * heads, Q, L, P, 2]
    found = []
    for number, level in enumerate(value.split([height * columns for height, columns in shapes], 1)):
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, width, *shapes[number])
        found.append(F.grid_sample(maps, grids[:, :, number], align_corners=False))
    shares = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    summed = (torch.stack(found, -2).flatten(-2) * shares).sum(-1)
    return summed.view(batch, heads * width, queries).transpose(1, 2)


CORES: dict[str, Core] = {"at once": at_once, "ours": sample}


def sampling(device: str, rounds: int) -> list[Row]:
    """Measure the sampling of an encoder layer, forward and backward, on one image of 800 x 1066."""
    works = {side: sampling_work(core, device) for side, core in CORES.items()}
    expected, found = (torch.as_tensor(works[side]()) for side in CORES)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    rows = []
    timings = side_by_side(works, rounds=rounds, device=device)
    for side, timing in timings.items():
        ratio = timings["at once"].ratio_to(timing)
        command = [sys.executable, "-m", "tests.bench.deformable", side, device]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        rows.append(
            {"case": "sampling", "side": side, "median_s": timing.median_s, "speed_ratio": ratio, "peak_bytes": peak}
        )
        print(
            f"deformable sampling, one layer, 800 x 1066: {side:8} median {timing.median_s * 1e3:7.1f} ms, "
            f"{ratio:.2f} times as fast, peak {peak / 2**20:.0f} MiB",
            flush=True,
        )
    return rows


def sampling_work(
    core: Core, device: str, shapes: tuple[tuple[int, int], ...] = SHAPES, images: int = 1
) -> Callable[[], Tensor]:
    """Return a forward and backward pass of a core, whose result is the gradient of the offsets."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(height * width for height, width in shapes)
    value = torch.randn(images, cells, HEADS, WIDTH, generator=generator)
    locations = torch.rand(images, cells, HEADS, len(shapes), POINTS, 2, generator=generator)
    weights = torch.rand(images, cells, HEADS, len(shapes), POINTS, generator=generator)
    leaves = [tensor.to(device).requires_grad_() for tensor in (value, locations, weights)]

    def work() -> Tensor:
        return torch.autograd.grad(core(*leaves, shapes).square().sum(), leaves)[1]

    return work


def matching(device: str, rounds: int) -> list[Row]:
    """Measure matching of 6 layers by the focal cost; 1,800 queries are those of hybrid matching, 7 objects 6 times."""
    rows = []
    for queries, images, boxes in ((300, 8, 7), (300, 32, 7), (1800, 8, 42)):
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(LAYERS, images, queries, CLASSES, generator=generator).to(device)
        corners = torch.rand(LAYERS, images, queries, 4, generator=generator).to(device)
        packed = pack(targets(images, boxes), CLASSES, logits.device)
        works: dict[str, Work] = {
            "per layer": partial(per_layer, logits, corners, packed),
            "ours": partial(match_layers, logits, corners, packed, LOSS, focal_cost),
        }
        timings = side_by_side(works, rounds=rounds, calls=3, device=device)
        for side, timing in timings.items():
            ratio = timings["per layer"].ratio_to(timing)
            title = f"matching, {queries} queries, {images} images, {boxes} boxes"
            rows.append({"case": title, "side": side, "median_s": timing.median_s, "speed_ratio": ratio})
            print(f"{title:45} {side:10} median {timing.median_s * 1e3:8.1f} ms, {ratio:.2f} times as fast", flush=True)
    return rows


def per_layer(logits: Tensor, boxes: Tensor, packed: PackedTargets) -> list[Any]:
    """Return pairs as the originals find them: layer by layer, the queries of each image against the objects of all."""
    found = []
    true = box_convert(packed.boxes, "cxcywh", "xyxy")
    for layer_logits, layer_boxes in zip(logits.flatten(1, 2), boxes.flatten(1, 2), strict=True):
        costs = LOSS.cost_class * focal_cost(layer_logits, LOSS)[:, packed.labels]
        costs += LOSS.cost_bbox * torch.cdist(layer_boxes, packed.boxes, p=1)
        costs -= LOSS.cost_giou * generalized_box_iou(box_convert(layer_boxes, "cxcywh", "xyxy"), true)
        by_image = costs.view(*logits.shape[1:3], -1).cpu().split(packed.counts, -1)
        found += [linear_sum_assignment(block[image]) for image, block in enumerate(by_image)]
    return found


def main() -> None:
    side, device = sys.argv[1:]
    work, peak = sampling_work(CORES[side], device), PeakMemory(device)
    before = peak.bytes()
    work()
    print(peak.bytes() - before)


if __name__ == "__main__":
    main()
