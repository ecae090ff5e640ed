"""Captured passes neither wait for the device nor copy from the host, on a GPU that is pretended: a graph could not hold it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from detr import batch as batches_module
from detr import kept, position
from detr.batch import collate
from detr.config import DeformableConfig
from detr.deformable import attention
from pipeline.config import RunConfig
from pipeline.data.canvases import Canvas, ChosenCanvases
from pipeline.distributed.ranks import Ranks
from pipeline.training.graphs.capture import Replay, Work
from pipeline.training.graphs.passes import Graphs
from pipeline.training.model import build_on_device
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.support.pretended_gpu import Event, PretendedGpu, pretended_gpu
from tests.support.repeated import RepeatedWork
from tests.support.step_samples import CONFIG, UNEVEN, samples

GPU = torch.device("cuda:0")
HYBRID = DeformableConfig(
    levels=3, box_refine=True, two_stage=True, mixed_selection=True, look_forward_twice=True, one_to_many_queries=4
)
MODELS = {
    "boxes": replace(CONFIG.model, dropout=0.1),
    "frozen norm": replace(CONFIG.model, norm="frozen_batch", frozen_stages=1),
    "learned positions": replace(CONFIG.model, position="learned"),
    "masks": replace(CONFIG.model, masks=True, hidden_dim=128, heads=8),
    "deformable, hybrid": replace(CONFIG.model, variant="deformable", hidden_dim=32, deformable=HYBRID),
    "conditional": replace(CONFIG.model, variant="conditional", hidden_dim=32),
}


class Watching(RepeatedWork):
    """Recorder that keeps what a graph could not hold."""

    def __init__(self, pretended: PretendedGpu) -> None:
        super().__init__()
        self.found: list[Event] = []
        self._pretended = pretended

    def record(self, work: Work) -> tuple[list[Tensor], Replay]:
        faults = (self._pretended.waits, self._pretended.copies_from_host)
        before = [len(events) for events in faults]
        recorded = super().record(work)
        for events, count in zip(faults, before, strict=True):
            self.found += events[count:]
        return recorded


@pytest.fixture
def gpu() -> Iterator[PretendedGpu]:
    with pretended_gpu() as pretended:
        yield pretended
    for cache in (batches_module._scale_and_shift, position._kept_sine_grid, attention._kept_sizes, kept.constant):
        cache.cache_clear()


def step(config: RunConfig, pretended: PretendedGpu) -> Watching:
    torch.manual_seed(0)
    model = build_on_device(config, 4, GPU).train()
    recorder, canvas = Watching(pretended), Canvas(2, 64, 64)
    graphs = Graphs(model, ChosenCanvases((canvas,), 1, 1, 1.0, 0), config, Ranks(device=GPU), recorder)
    data = [
        (image, target if config.model.masks else replace(target, masks=None)) for image, target in samples(UNEVEN)[:2]
    ]
    optimizer = build_optimizer(model, config.optim)
    train_step(model, [collate(data)], optimizer, config, Ranks(device=GPU), 0, graphs=graphs)
    assert recorder.log[-4:] == ["record 0", "record 1", "replay 0", "replay 1"]
    return recorder


@pytest.mark.parametrize("name", MODELS)
def test_passes_of_each_variant_can_be_captured(name: str, gpu: PretendedGpu) -> None:
    assert step(replace(CONFIG, model=MODELS[name]), gpu).found == []


@pytest.mark.parametrize("fault", ["wait", "copy"])
def test_what_a_graph_cannot_hold_is_found(fault: str, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    position_of = position.SinePosition.forward

    def faulty(self: position.SinePosition, features: Tensor, padding: Tensor | None) -> Tensor:
        if fault == "wait":
            features.sum().item()
        else:
            torch.zeros(3).to(GPU, non_blocking=True)
        return position_of(self, features, padding)

    monkeypatch.setattr(position.SinePosition, "forward", faulty)
    assert len(step(CONFIG, gpu).found) == 1
