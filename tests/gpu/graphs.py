"""CUDA graphs beside the same steps without: losses, weights, waits, launches, images per second, memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from detr.batch import Batch, collate
from pipeline.config import RunConfig
from pipeline.data.canvases import Canvas, ChosenCanvases
from pipeline.distributed.ranks import Ranks
from pipeline.training.graphs.capture import CudaCapture
from pipeline.training.graphs.passes import Graphs
from pipeline.training.step import train_step
from tests.bench.timing import side_by_side
from tests.gpu.results import Results
from tests.gpu.steps import Kind, Step, profiled, run_config
from tests.gpu.throughput import drawn_samples
from tests.gpu.work import Setting, batch_of
from tests.support.repeated import RepeatedWork

_MULTIPLE = 64
_BATCHES = 8


def graphs_of(batches: Sequence[Batch], model: nn.Module, config: RunConfig, ranks: Ranks) -> Graphs:
    """Return graphs for the canvases of all batches; on a CPU, the work is repeated instead."""
    canvases = {Canvas(len(batch.images), *batch.images.shape[2:]) for batch in batches}
    chosen = ChosenCanvases(tuple(sorted(canvases)), len(canvases), len(batches), 1.0, 0)
    recorder = CudaCapture(ranks.device) if ranks.device.type == "cuda" else RepeatedWork()
    return Graphs(model, chosen, config, ranks, recorder)


class GraphedStep(Step):
    """Training steps over batches in turn, through graphs of all their canvases or without."""

    def __init__(self, config: RunConfig, batches: Sequence[Batch], setting: Setting, *, graphed: bool) -> None:
        super().__init__(Kind(config, [*batches]), setting)
        self.graphs = graphs_of(batches, self.model, config, self.ranks) if graphed else None

    def __call__(self) -> Any:
        batch = self.kind.batches[self.number % len(self.kind.batches)]
        self.number += 1
        return train_step(
            self.model, [batch], self.optimizer, self.kind.config, self.ranks, self.number, graphs=self.graphs
        )


def run(results: Results, setting: Setting) -> None:
    for precision in ("fp32",) if setting.tiny else ("fp32", "bf16"):
        results.attempt(precision, lambda precision=precision: _same(results, setting, precision))
    for images in (1,) if setting.tiny else (1, 2, 8, 16):
        results.attempt(f"batches of {images}", lambda images=images: _fast(results, setting, images))
        if setting.cuda:
            torch.cuda.empty_cache()


def _same(results: Results, setting: Setting, precision: str) -> None:
    """Compare losses and weights after steps with dropout; a second run without graphs shows the run's own rounding."""
    config = run_config(setting, compute={"precision": precision})
    sizes = setting.sizes((480, 640), (512, 640), (640, 512), (480, 640))
    batches = [batch_of([size, size], seed=seed, pinned=setting.cuda) for seed, size in enumerate(sizes)]
    found = {}
    for name in ("without", "without again", "with"):
        step = GraphedStep(config, batches, setting, graphed=name == "with")
        losses = [float(step().losses.total.detach()) for _ in range((1 if setting.tiny else 3) * len(batches))]
        weights = torch.cat([value.detach().flatten().double() for value in step.model.parameters()])
        found[name] = losses, weights.cpu(), step
    expected, of_weights, _ = found["without"]
    for name in ("without again", "with"):
        losses, weights, step = found[name]
        results.put(
            f"{precision}, {name} graphs against without",
            losses=max(abs(loss / other - 1) for loss, other in zip(losses, expected, strict=True)),
            weights=float((weights - of_weights).norm() / of_weights.norm()),
            same_bits=bool(torch.equal(weights, of_weights)),
            replayed=step.graphs.read_hit_rate() if step.graphs else 0.0,
        )


def _fast(results: Results, setting: Setting, images: int) -> None:
    precision = "fp32" if setting.tiny else "bf16"
    config = run_config(setting, compute={"precision": precision, "canvas_multiple": _MULTIPLE})
    batches = []
    for samples in drawn_samples(setting, images, 2 if setting.tiny else _BATCHES):
        batch = collate(samples, _MULTIPLE)
        batches.append(batch.pin_memory() if setting.cuda else batch)
    steps = {
        name: GraphedStep(config, batches, setting, graphed=name == "with graphs")
        for name in ("without graphs", "with graphs")
    }
    reserved = {}
    for name, step in steps.items():
        before = torch.cuda.memory_reserved() if setting.cuda else 0
        for _ in batches:
            step()  # captures each canvas
        reserved[name] = (torch.cuda.memory_reserved() - before if setting.cuda else 0) / 2**30
    timings = side_by_side(
        steps, rounds=1 if setting.tiny else 3, calls=1 if setting.tiny else len(batches), device=setting.device
    )
    for name, step in steps.items():
        seconds = timings[name].median_s
        waits = setting.waits(step)
        results.put(
            f"{precision}, {name}, batches of {images}",
            images_per_s=images / seconds,
            ratio=timings["without graphs"].ratio_to(timings[name]),
            waits=len(waits),
            where=waits,
            reserved_gib=reserved[name],
            **profiled(step, setting),
        )
