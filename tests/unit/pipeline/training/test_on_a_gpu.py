"""Training on a GPU that is pretended: nothing is left on the host, and the host waits as often as it must and no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detr import batch as batches_module
from detr import kept, position
from detr.batch import Batch, collate
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.training import step as step_module
from pipeline.training.divergence import Diverged
from pipeline.training.ema import Ema
from pipeline.training.model import build_on_device
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.support.pretended_gpu import Event, PretendedGpu, TwoDevicesError, pretended_gpu
from tests.support.step_samples import CONFIG, UNEVEN, samples

MASKS = replace(CONFIG, model=replace(CONFIG.model, masks=True, hidden_dim=128, heads=8))
Passes = list[tuple[int, int]]
CASES: dict[str, tuple[RunConfig, Passes]] = {
    "boxes": (CONFIG, [(0, 8)]),
    "masks, and a pass without images": (MASKS, [(0, 8), (8, 8)]),
    "recomputed, in three passes": (
        replace(CONFIG, compute=replace(CONFIG.compute, recompute="both")),
        [(0, 3), (3, 5), (5, 8)],
    ),
    "channels last": (replace(CONFIG, compute=replace(CONFIG.compute, channels_last=True)), [(0, 8)]),
    "per rank": (replace(CONFIG, optim=replace(CONFIG.optim, normalise="per_rank")), [(0, 4), (4, 8)]),
}
GPU = torch.device("cuda:0")


@contextmanager
def gpu() -> Iterator[PretendedGpu]:
    """A pretended GPU whose tensors no cache keeps afterwards."""
    caches = (batches_module._scale_and_shift, position._kept_sine_grid, kept.constant)
    try:
        with pretended_gpu() as pretended:
            yield pretended
    finally:
        for cache in caches:
            cache.cache_clear()


def micro_batches(config: RunConfig, passes: Passes) -> list[Batch]:
    data = samples(UNEVEN)
    if not config.model.masks:
        data = [(image, replace(target, masks=None)) for image, target in data]
    return [collate(data[start:stop]) for start, stop in passes]


def build(config: RunConfig, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = build_on_device(config, 4, device)
    return model, build_optimizer(model, config.optim)


def losses(config: RunConfig, passes: Passes, device: torch.device) -> list[Tensor]:
    """Return the losses of two steps."""
    model, optimizer = build(config, device)
    given, ranks = micro_batches(config, passes), Ranks(device=device)
    return [train_step(model, given, optimizer, config, ranks, number).losses.total for number in range(2)]


def waits_per_step(pretended: PretendedGpu, steps: int) -> dict[str, float]:
    counted = Counter(event.file for event in pretended.waits)
    return {file: count / steps for file, count in counted.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_the_matcher_of_each_pass_and_once_more(name: str) -> None:
    config, passes = CASES[name]
    expected = [loss.item() for loss in losses(config, passes, torch.device("cpu"))]
    with gpu() as pretended:
        found = losses(config, passes, GPU)
        waited = waits_per_step(pretended, 2)
        assert [loss.tolist() for loss in found] == pytest.approx(expected, rel=1e-5)
    of_matcher = sum(stop > start for start, stop in passes)
    assert waited == {"detr/matcher.py": of_matcher, "pipeline/training/step.py": 1}


def test_a_step_launches_no_kernel_for_what_is_constant_and_one_for_all_gradients() -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, norm="frozen_batch", frozen_stages=1))
    with gpu() as pretended:
        model, optimizer = build(config, GPU)
        ranks = Ranks(device=GPU)
        launches = []
        for number in range(2):
            pretended.launches.clear()
            train_step(model, micro_batches(config, [(0, 8)]), optimizer, config, ranks, number)
            counted = Counter(event.operation for event in pretended.launches.elements())
            launches.append(
                {name: counted[f"aten.{name}"] for name in ("rsqrt", "_foreach_norm", "_foreach_mul_", "mul_")}
            )
    norms = sum(name.endswith("running_var") for name, _ in model.named_buffers())
    once = {"_foreach_norm": 1, "_foreach_mul_": 1, "mul_": launches[0]["mul_"]}
    assert launches == [{"rsqrt": norms} | once, {"rsqrt": 0} | once]
    assert once["mul_"] < 10


def test_averages_of_the_weights_follow_without_a_wait() -> None:
    with gpu() as pretended:
        model, optimizer = build(CONFIG, GPU)
        averages = Ema(model, 0.9)
        train_step(model, micro_batches(CONFIG, [(0, 8)]), optimizer, CONFIG, Ranks(device=GPU), 0)
        before = len(pretended.waits)
        averages.update(0)
        assert len(pretended.waits) == before
        assert all(value.device == GPU for value in averages.averages.values())


def test_a_step_that_diverges_is_described_and_leaves_the_weights() -> None:
    with gpu():
        model, optimizer = build(CONFIG, GPU)
        config = replace(CONFIG, guard=replace(CONFIG.guard, max_grad_norm=1e-9))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with pytest.raises(Diverged, match="norm"):
            train_step(model, micro_batches(config, [(0, 8)]), optimizer, config, Ranks(device=GPU), 0)
        same = [torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert all(same)


def unmoved(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **more: Any) -> Any:
        result = run(*given, **more)
        return result._replace(total=result.total + torch.ones(1))

    return call


def asked(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **more: Any) -> Any:
        result = run(*given, **more)
        result.total.item()
        return result

    return call


def masked(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **more: Any) -> Any:
        boxes = given[0].boxes
        boxes[boxes > 0.5]
        return run(*given, **more)

    return call


def counted(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any, **more: Any) -> Any:
        (given[0].logits > 0).nonzero()
        return run(*given, **more)

    return call


@pytest.mark.parametrize(
    ("fault", "operation"),
    [(asked, "aten._local_scalar_dense"), (masked, "aten.index"), (counted, "aten.nonzero")],
    ids=["item", "boolean mask", "nonzero"],
)
def test_a_wait_too_many_is_found(fault: Callable[..., Any], operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "compute_losses", fault(step_module.compute_losses))
    with gpu() as pretended:
        losses(CONFIG, [(0, 8)], GPU)
    assert waits_per_step(pretended, 2) != {"detr/matcher.py": 1, "pipeline/training/step.py": 1}
    assert Event(operation, "pipeline/training/step.py") in pretended.waits


def test_a_tensor_that_is_left_on_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "compute_losses", unmoved(step_module.compute_losses))
    with gpu(), pytest.raises(TwoDevicesError, match="cuda:0 and, of shapes"):
        losses(CONFIG, [(0, 8)], GPU)


def test_a_state_of_the_optimizer_that_is_left_on_the_host_is_found() -> None:
    with gpu():
        model, optimizer = build(CONFIG, GPU)
        given, ranks = micro_batches(CONFIG, [(0, 8)]), Ranks(device=GPU)
        train_step(model, given, optimizer, CONFIG, ranks, 0)
        first = next(iter(optimizer.state.values()))
        first["exp_avg"] = first["exp_avg"].cpu()
        with pytest.raises(TwoDevicesError):
            train_step(model, given, optimizer, CONFIG, ranks, 1)
