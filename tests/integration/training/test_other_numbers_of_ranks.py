"""A run that is resumed with another number of ranks: the same samples, the same losses."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import ClusterConfig, RunConfig
from pipeline.distributed.parallel import Strategy
from pipeline.distributed.ranks import Ranks
from pipeline.driver.preflight import prepare
from pipeline.training import loop
from pipeline.training.state import RunInfo
from pipeline.training.step import StepResult
from tests.support.ranks import on_two_nodes, run_ranks

IMAGES, STEPS = 12, 16
Steps = dict[int, tuple[list[int], float]]


class _CrashError(Exception):
    """Stands for whatever ends a group of workers between two checkpoints."""


@pytest.fixture(scope="module")
def config(tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Use canvases of one size, no dropout, and too small a rate for rounding to change an assignment."""
    config = replace(
        tiny_config,
        model=replace(tiny_config.model, dropout=0.0),
        transform=replace(tiny_config.transform, train_scales=(64,)),
        optim=replace(tiny_config.optim, batch_size=6, epochs=STEPS * 6 // IMAGES, lr=1e-4, lr_backbone=1e-5),
        evaluate=replace(tiny_config.evaluate, every=100),
        checkpoint=replace(tiny_config.checkpoint, every_steps=3),
        storage=str(tmp_path_factory.mktemp("runs")),
    )
    return prepare(config, lambda _: None)[0]


def go_on(ranks: Ranks, config: RunConfig, strategy: Strategy, folder: Path, crash: int | None) -> Steps:
    """Train from the newest checkpoint to the end or a crash; return the images and the loss of each step."""
    taken: Steps = {}
    train_step = loop.train_step

    def recorded(
        model: Any, batches: Any, optimizer: Any, config: Any, ranks: Ranks, step: int, *rest: Any
    ) -> StepResult:
        if step == crash:
            raise _CrashError
        result = train_step(model, batches, optimizer, config, ranks, step, *rest)
        ids = ranks.all_gather([target.image_id for batch in batches for target in batch.targets])
        loss = float(ranks.sum(result.losses.total.detach().clone())) / ranks.world_size
        taken[step] = [image_id for of_rank in ids for image_id in of_rank], loss
        return result

    loop.train_step = recorded
    try:
        cluster = ClusterConfig(workers=ranks.world_size, strategy=strategy)
        loop.run(replace(config, cluster=cluster), RunInfo("run", folder, "commit"), on_two_nodes(ranks), None)
    except _CrashError:
        pass
    finally:
        loop.train_step = train_step
    return taken


def test_two_then_one_then_three_then_four_ranks_are_one_run(config: RunConfig, tmp_path: Path) -> None:
    def attempt(folder: Path, count: int, strategy: Strategy, crash: int | None) -> Steps:
        return run_ranks(count, go_on, config, strategy, folder, crash)[0]

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        prepare(config, lambda _: None)[1].write_initial_weights(tmp_path / name)
    whole = attempt(tmp_path / "whole", 1, "single", None)
    parts = attempt(tmp_path / "parts", 2, "ddp", 5)
    assert max(parts) == 4
    one = attempt(tmp_path / "parts", 1, "single", 11)
    assert min(one) == 3, "steps after the last checkpoint are taken again"
    three = attempt(tmp_path / "parts", 3, "fsdp", 13)
    assert min(three) == 9
    four = attempt(tmp_path / "parts", 4, "hsdp", None)
    assert (min(four), max(four)) == (12, STEPS - 1)
    kept = parts | one | three | four
    assert sorted(kept) == sorted(whole) == list(range(STEPS))
    stream = [number for step in range(STEPS) for number in kept[step][0]]
    for epoch in range(0, len(stream), IMAGES):
        assert set(Counter(stream[epoch : epoch + IMAGES]).values()) == {1}
        assert len(set(stream[epoch : epoch + IMAGES])) == IMAGES
    assert [sorted(kept[step][0]) for step in range(STEPS)] == [sorted(whole[step][0]) for step in range(STEPS)]
    losses, expected = (torch.tensor([steps[step][1] for step in range(STEPS)]) for steps in (kept, whole))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert (expected[-1] - expected[0]).abs() > 1e-3 * expected[0], "nothing changed, so nothing was compared"
