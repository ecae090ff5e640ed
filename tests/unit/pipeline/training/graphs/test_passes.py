"""Passes that are replayed: the same steps as without graphs, in the order of the batches, on buffers that never move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from detr.batch import Batch, collate
from detr.config import DeformableConfig
from pipeline.config import ComputeConfig, RunConfig
from pipeline.data.canvases import Canvas, ChosenCanvases
from pipeline.distributed.ranks import Ranks
from pipeline.training.divergence import Diverged
from pipeline.training.graphs.capture import CudaCapture
from pipeline.training.graphs.passes import Graphs
from pipeline.training.model import build_on_device
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.support.repeated import RepeatedWork
from tests.support.step_samples import CONFIG, UNEVEN, samples

DROPPING = replace(CONFIG, model=replace(CONFIG.model, dropout=0.3))
CONFIGS = {
    "boxes": DROPPING,
    "bf16": replace(DROPPING, compute=ComputeConfig(precision="bf16")),
    "masks": replace(DROPPING, model=replace(DROPPING.model, masks=True, hidden_dim=128, heads=8)),
    "head alone": replace(
        DROPPING,
        model=replace(DROPPING.model, masks=True, hidden_dim=128, heads=8),
        optim=replace(CONFIG.optim, train="mask_head"),
    ),
    "deformable": replace(
        DROPPING,
        model=replace(DROPPING.model, variant="deformable", hidden_dim=32, deformable=DeformableConfig(levels=3)),
    ),
    "conditional": replace(DROPPING, model=replace(DROPPING.model, variant="conditional", hidden_dim=32)),
    "a loss off": replace(DROPPING, loss=replace(CONFIG.loss, weight_bbox=0.0, weight_giou=0.0)),
}
CPU = torch.device("cpu")
SMALL, WIDE, RARE = Canvas(2, 64, 64), Canvas(2, 64, 96), Canvas(2, 96, 64)


def batch_on(canvas: Canvas, first: int = 0, masks: bool = False) -> Batch:
    """Return images of 64 x 64 on the canvas, with its padding even if there is none."""
    data = samples(UNEVEN)[first : first + canvas.images]
    data = [(image, target if masks else replace(target, masks=None)) for image, target in data]
    small = collate(data)
    images = torch.zeros(canvas.images, canvas.height, canvas.width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    padding = torch.ones(canvas.images, canvas.height, canvas.width, dtype=torch.bool)
    images[:, :, :64, :64], padding[:, :64, :64] = small.images, False
    return replace(small, images=images, padding=padding)


def chosen(*canvases: Canvas, left: int = 0) -> ChosenCanvases:
    return ChosenCanvases(canvases, len(canvases), 10, 1.0, left)


class Trained:
    """A model that takes steps, through `graphs` or without."""

    def __init__(
        self,
        config: RunConfig,
        *canvases: Canvas,
        left: int = 0,
        recorder: RepeatedWork | None = None,
        device: torch.device = CPU,
    ) -> None:
        torch.manual_seed(0)
        self.config, self.recorder, self.ranks = config, recorder or RepeatedWork(), Ranks(device=device)
        self.model: nn.Module = build_on_device(config, 4, device).train()
        self.optimizer = build_optimizer(self.model, config.optim)
        self.graphs: Graphs | None = None
        if canvases:
            capture = self.recorder if device == CPU else CudaCapture(device)
            self.graphs = Graphs(self.model, chosen(*canvases, left=left), config, self.ranks, capture)
        self.steps = 0

    def step(self, *batches: Batch) -> dict[str, Tensor]:
        result = train_step(
            self.model, batches, self.optimizer, self.config, self.ranks, self.steps, graphs=self.graphs
        )
        self.steps += 1
        return {"total": result.losses.total.detach(), "norm": result.grad_norm, **result.losses.parts}

    def replayed(self) -> list[str]:
        return [line for line in self.recorder.log if line.startswith("replay")]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_same_steps(config: RunConfig, steps: Sequence[Sequence[Batch]], graphed: Trained) -> None:
    plain = Trained(config)
    for batches in steps:
        assert_equal(graphed.step(*batches), plain.step(*batches))
    assert_equal(graphed.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_steps_are_those_without_graphs_bit_for_bit(name: str) -> None:
    config = CONFIGS[name]
    masks = config.model.masks
    order = [(WIDE, 0), (SMALL, 4), (WIDE, 2), (RARE, 0), (SMALL, 0), (WIDE, 6)]
    graphed = Trained(config, SMALL, WIDE)
    assert_same_steps(config, [[batch_on(canvas, first, masks)] for canvas, first in order], graphed)
    # Forward and backward of the first canvas, of the second, of the first again, none, of both again.
    replays = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert graphed.replayed() == [f"replay {number}" for number in replays]
    assert graphed.graphs is not None
    assert graphed.graphs.read_hit_rate() == pytest.approx(5 / 6)
    assert graphed.graphs.read_hit_rate() == 0.0


def test_micro_batches_with_and_without_a_graph_add_up() -> None:
    batches = [batch_on(SMALL, 0), batch_on(RARE, 2), batch_on(SMALL, 4), collate([])]
    plain, graphed = Trained(DROPPING), Trained(DROPPING, SMALL)
    for _ in range(2):
        expected, found = plain.step(*batches), graphed.step(*batches)
        assert found["total"].item() == expected["total"].item()
        assert found["norm"].item() == pytest.approx(expected["norm"].item(), rel=1e-6)
    assert len(graphed.replayed()) == 8
    assert graphed.graphs is not None
    assert graphed.graphs.read_hit_rate() == pytest.approx(2 / 3)  # a pass without images is none


def test_a_batch_without_padding_is_replayed_with_an_empty_one() -> None:
    plain, graphed = Trained(CONFIG), Trained(CONFIG, WIDE)
    padded = batch_on(WIDE)
    assert_equal(graphed.step(padded), plain.step(padded))
    found = graphed.step(replace(padded, padding=None))
    assert_equal(found, plain.step(replace(padded, padding=torch.zeros(2, 64, 96, dtype=torch.bool))))
    assert len(graphed.replayed()) == 4


def test_predictions_outlive_the_next_replay() -> None:
    """A step that diverges is described by the predictions of all its passes."""
    graphs = Trained(CONFIG, SMALL).graphs
    assert graphs is not None
    first = graphs.forward(batch_on(SMALL), 0)
    graphs.backward(first.logits.sum())
    kept = first.logits.clone()
    second = graphs.forward(batch_on(SMALL, 2), 0)
    assert torch.equal(first.logits, kept)
    assert not torch.equal(second.logits, kept)


def test_a_replayed_step_that_diverges_raises_and_the_next_one_trains() -> None:
    graphed = Trained(CONFIG, SMALL)
    graphed.step(batch_on(SMALL))
    bias = graphed.model.get_parameter("class_embed.bias")
    with torch.no_grad():
        before = bias.clone()
        bias.fill_(torch.nan)
    with pytest.raises(Diverged, match="logits of images 0, 1"):
        graphed.step(batch_on(SMALL))
    with torch.no_grad():
        bias.copy_(before)
    assert graphed.step(batch_on(SMALL, 2))["total"].isfinite()


def test_weights_that_have_moved_are_captured_again() -> None:
    plain, graphed = Trained(CONFIG), Trained(CONFIG, SMALL)
    for trained in (plain, graphed):
        trained.step(batch_on(SMALL))
        parameter = trained.model.get_parameter("class_embed.weight")
        parameter.data = parameter.data * 2
    assert_equal(graphed.step(batch_on(SMALL)), plain.step(batch_on(SMALL)))
    assert graphed.recorder.log.count("record 2") == 1


def test_canvases_beyond_the_memory_run_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    steps = [[batch_on(canvas)] for canvas in (SMALL, WIDE, RARE, WIDE)]
    graphed = Trained(CONFIG, SMALL, WIDE, RARE, recorder=RepeatedWork(shortage_after=2))
    assert_same_steps(CONFIG, steps, graphed)
    assert graphed.replayed() == ["replay 0", "replay 1"]
    assert "2 images of 64x96" in caplog.text


@pytest.mark.parametrize(("free", "captured"), [(94e3, 1), (95e3, 2)])
def test_memory_is_kept_for_the_largest_pass_without_a_graph(free: float, captured: int) -> None:
    """A capture of 8,192 pixels takes 10,000 bytes: the wide canvas would take 5,000 more, and the one left 79,350."""
    recorder = RepeatedWork(bytes_each=5e3, free=free)
    graphed = Trained(CONFIG, SMALL, WIDE, left=65_000, recorder=recorder)
    for canvas in (SMALL, WIDE):
        graphed.step(batch_on(canvas))
    assert len(graphed.replayed()) == 2 * captured


@pytest.mark.parametrize(("free", "captured"), [(24e3, 1), (26e3, 2)])
def test_memory_is_kept_for_an_evaluation_if_all_canvases_have_graphs(free: float, captured: int) -> None:
    """The wide canvas would take 5,000 bytes more than the 10,000 of the small one; a tenth of 100,000 is kept."""
    graphed = Trained(CONFIG, SMALL, WIDE, recorder=RepeatedWork(bytes_each=5e3, free=free, total=1e5))
    for canvas in (SMALL, WIDE):
        graphed.step(batch_on(canvas))
    assert len(graphed.replayed()) == 2 * captured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "head alone"])
def test_graphs_of_a_gpu_give_the_losses_without_them(name: str) -> None:
    """With the same dropout, drawn from the seed of each step; bf16 and TF32 round."""
    device, config = torch.device("cuda", torch.cuda.current_device()), CONFIGS[name]
    plain, graphed = Trained(config, device=device), Trained(config, SMALL, WIDE, device=device)
    for canvas, first in [(WIDE, 0), (SMALL, 4), (WIDE, 2), (RARE, 0), (SMALL, 0), (WIDE, 6), (WIDE, 0)]:
        batch = batch_on(canvas, first, config.model.masks).pin_memory()
        found, expected = graphed.step(batch), plain.step(batch)
        assert found["total"].item() == pytest.approx(expected["total"].item(), rel=2e-2)
    assert graphed.graphs is not None
    assert graphed.graphs.read_hit_rate() == pytest.approx(6 / 7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_of_a_replay_is_that_of_the_seed() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    graphs = Trained(DROPPING, SMALL, device=device).graphs
    assert graphs is not None
    batch = batch_on(SMALL)
    found = []
    for seed in (1, 2, 1):
        found.append(graphs.forward(batch, seed).logits)
        graphs.backward(found[-1].sum())
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
