"""Averages of the weights: what they are, that a stop costs nothing, and that they are what is evaluated."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from detr.batch import Batch
from detr.model import DETR, build_model
from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.metadata import read_meta
from pipeline.config import GuardConfig, OptimConfig, RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RunConfigError
from pipeline.evaluation.evaluate_model import EvaluateOptions, evaluate_model
from pipeline.training import loop as module
from pipeline.training.ema import Ema, decay_at
from pipeline.training.loop import run
from pipeline.training.model import save_initial
from pipeline.training.state import RunInfo
from pipeline.training.step import StepResult, train_step
from shards.dataset.manifest import load_manifest

Weights = dict[str, torch.Tensor]


def test_the_average_moves_by_the_decay_and_faster_at_first() -> None:
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    bias = model.bias.clone()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 6.0]]))
    ema.update(0)
    kept = 2 / 11
    torch.testing.assert_close(
        ema.averages["weight"], torch.tensor([[1 * kept + 3 * (1 - kept), 2 * kept + 6 * (1 - kept)]])
    )
    assert model.weight.tolist() == [[3.0, 6.0]]
    before = ema.averages["weight"].clone()
    ema.update(10_000)
    torch.testing.assert_close(ema.averages["weight"], before * 0.9 + model.weight.detach() * 0.1)
    assert torch.equal(ema.averages["bias"], bias)
    assert [decay_at(0.999, step) for step in (0, 7, 10**6)] == [2 / 11, 9 / 18, 0.999]


@pytest.mark.parametrize("ema", [-0.1, 1.0, 1.5])
def test_an_impossible_decay_is_refused(ema: float) -> None:
    with pytest.raises(RunConfigError, match=r"optim.ema is .*; expected 0 \(off\) or a decay below 1"):
        OptimConfig(ema=ema)


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    return replace(
        tiny_config,
        optim=replace(tiny_config.optim, ema=0.6),
        checkpoint=replace(tiny_config.checkpoint, every_steps=2, keep=9),
    )


def start(config: RunConfig, folder: Path) -> RunInfo:
    torch.manual_seed(config.seed)
    save_initial(build_model(config.model, 4), folder)
    return RunInfo("run", folder, "commit")


def loaded(config: RunConfig, folder: Path, step: int, averaged: bool) -> DETR:
    model = build_model(config.model, 4)
    checkpoint_state.load_weights(catalog.folder_of(folder, step), model, averaged=averaged)
    return model


def both(config: RunConfig, folder: Path, step: int) -> list[Weights]:
    return [loaded(config, folder, step, averaged).state_dict() for averaged in (False, True)]


def same(first: list[Weights], second: list[Weights]) -> bool:
    return all(torch.equal(value, b[name]) for a, b in zip(first, second, strict=True) for name, value in a.items())


def test_an_interrupted_run_has_identical_averages(config: RunConfig, tmp_path: Path) -> None:
    uninterrupted, interrupted = start(config, tmp_path / "uninterrupted"), start(config, tmp_path / "interrupted")
    run(config, uninterrupted, Ranks(), None)
    for steps in (3, 4, 0):
        run(replace(config, optim=replace(config.optim, max_steps=steps)), interrupted, Ranks(), None)
    weights, averages = found = both(config, interrupted.folder, 6)
    assert same(found, both(config, uninterrupted.folder, 6))
    assert not torch.equal(weights["class_embed.weight"], averages["class_embed.weight"])
    assert read_meta(catalog.folder_of(uninterrupted.folder, 6)).ema


def test_averaging_does_not_change_the_weights(config: RunConfig, tiny_config: RunConfig, tmp_path: Path) -> None:
    plain = replace(config, optim=tiny_config.optim)
    for name, chosen in (("with", config), ("without", plain)):
        run(chosen, start(chosen, tmp_path / name), Ranks(), None)
    assert same(both(config, tmp_path / "with", 6)[:1], [loaded(plain, tmp_path / "without", 6, False).state_dict()])
    assert not read_meta(catalog.folder_of(tmp_path / "without", 6)).ema


def test_the_average_is_evaluated(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Weights] = []

    def watched(model: nn.Module, *more: Any, **options: Any) -> Any:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})
        return evaluate_model(model, *more, **options)

    monkeypatch.setattr("pipeline.training.validation.evaluate_model", watched)
    run_info = start(config, tmp_path)
    run(config, run_info, Ranks(), None)
    assert [same([found], [both(config, tmp_path, step)[1]]) for step, found in zip((3, 6), seen, strict=True)] == [
        True
    ] * 2
    val = load_manifest(config.data.val)
    averaged = loaded(config, tmp_path, 6, True)
    expected = evaluate_model(averaged, val, val.categories, EvaluateOptions(config.transform, batch_size=2))
    assert expected is not None
    assert catalog.read_evaluation(catalog.folder_of(tmp_path, 6)) == pytest.approx(expected.score.metrics)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_step_that_is_not_taken_does_not_move_the_average(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Any
) -> None:
    def step(model: Any, batches: Sequence[Batch], *more: Any) -> StepResult:
        if more[3] == 5:
            next(target for target in batches[0].targets if len(target.boxes)).boxes[0, 2] = torch.nan
        return train_step(model, batches, *more)

    monkeypatch.setattr(module, "train_step", step)
    config = replace(config, guard=GuardConfig(policy=policy))
    run(config, start(config, tmp_path), Ranks(), None)
    # The fifth step, after the checkpoint of step 4, counts only where the sixth is skipped.
    assert same(both(config, tmp_path, 6), both(config, tmp_path, 4)) is (policy == "rollback")
    assert all(bool(value.isfinite().all()) for value in both(config, tmp_path, 6)[1].values())
