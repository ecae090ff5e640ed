"""Every variant of the model is the same run on one process and on several, and continues from a checkpoint bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from detr.batch import collate
from detr.compute import set_channels_last, set_recompute
from detr.config import DeformableConfig, LossConfig
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.config import RunConfig
from pipeline.distributed.parallel import distribute, unwrap
from pipeline.distributed.ranks import Ranks
from pipeline.training.ema import Ema
from pipeline.training.model import build_trainable_model
from pipeline.training.optim import build_optimizer
from pipeline.training.step import train_step
from tests.support.checkpoints import meta, save_checkpoint
from tests.support.ranks import run_ranks
from tests.support.step_samples import CONFIG, MODEL, UNEVEN, samples

REFINE = DeformableConfig(levels=3, box_refine=True, look_forward_twice=True)
VARIANTS = {
    "plain": DeformableConfig(levels=3),
    "hybrid": replace(REFINE, one_to_many_queries=9),
    "two stages": replace(REFINE, two_stage=True, mixed_selection=True, one_to_many_queries=9),
    "conditional": None,
}


def run_config(variant: str) -> RunConfig:
    if options := VARIANTS[variant]:
        model = replace(MODEL, variant="deformable", hidden_dim=32, deformable=options)
    else:
        model = replace(MODEL, variant="conditional", hidden_dim=32)
    return replace(
        CONFIG,
        model=model,
        loss=LossConfig(cost_class=2.0, weight_ce=2.0, one_to_many_copies=3),
        optim=replace(CONFIG.optim, lr=1e-4, lr_backbone=3e-5, clip_norm=0.1),
    )


def build(ranks: Ranks, strategy: str, config: RunConfig, seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = build_trainable_model(config, 4)
    set_channels_last(model)
    set_recompute(model, "both")
    wrapped = distribute(model, ranks, strategy)  # type: ignore[arg-type]
    return wrapped, build_optimizer(unwrap(wrapped), config.optim)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, ranks: Ranks, number: int) -> float:
    share = 8 // ranks.world_size
    mine = samples(UNEVEN)[ranks.rank * share : (ranks.rank + 1) * share]
    result = train_step(model, [collate(mine)], optimizer, config, ranks, number)
    return float(ranks.sum(result.losses.total.detach().clone())) / ranks.world_size


def losses(ranks: Ranks, strategy: str, variant: str) -> list[float]:
    config = run_config(variant)
    model, optimizer = build(ranks, strategy, config)
    return [step(model, optimizer, config, ranks, number) for number in range(20)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_have_the_losses_of_a_single_process(variant: str) -> None:
    (expected,) = run_ranks(1, losses, "single", variant)
    assert expected[-1] < expected[0]
    for strategy in ("ddp", "fsdp"):
        for found in run_ranks(2, losses, strategy, variant):
            assert found == pytest.approx(expected, rel=1e-5)


def compiled_losses(ranks: Ranks, variant: str) -> list[float]:
    config = run_config(variant)
    torch.manual_seed(0)
    model = build_trainable_model(config, 4)
    model.compile(dynamic=False, backend="aot_eager")  # what depends on the model; kernels would take minutes
    wrapped = distribute(model, ranks, "fsdp")
    optimizer = build_optimizer(unwrap(wrapped), config.optim)
    found = [step(wrapped, optimizer, config, ranks, number) for number in range(3)]
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["hybrid", "two stages", "conditional"])
def test_compiled_fsdp_has_the_losses_of_a_single_process(variant: str) -> None:
    expected = run_ranks(1, losses, "single", variant)[0][:3]
    assert run_ranks(2, compiled_losses, variant, timeout_s=300)[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_in_bf16_has_nearly_the_loss_of_fp32(variant: str) -> None:
    found = {}
    for precision in ("fp32", "bf16"):
        config = run_config(variant)
        config = replace(config, compute=replace(config.compute, precision=precision))
        model, optimizer = build(Ranks(), "single", config)
        found[precision] = step(model, optimizer, config, Ranks(), 0)
        assert all(p.isfinite().all() for p in model.parameters())
    assert found["bf16"] != found["fp32"]
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.03)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_has_equal_bits(variant: str, tmp_path: Path) -> None:
    config, ranks = run_config(variant), Ranks()
    model, optimizer = build(ranks, "single", config)
    ema = Ema(model, 0.9)
    for number in range(4):
        if number == 2:
            save_checkpoint(tmp_path, model, optimizer, meta(2), ranks, ema.averages)
        step(model, optimizer, config, ranks, number)
        ema.update(number)
    again, other = build(ranks, "single", config, seed=1)
    averages = Ema(again, 0.9)
    path = catalog.newest(tmp_path)
    assert path is not None
    checkpoint_state.load(path, again, other, ranks, averages.averages)
    for number in (2, 3):
        step(again, other, config, ranks, number)
        averages.update(number)
    for before, after in zip((model.state_dict(), ema.averages), (again.state_dict(), averages.averages), strict=True):
        assert all(torch.equal(value, after[name]) for name, value in before.items())
