"""Canvases counted in the plan: those that the loader then makes, the most frequent first."""

from collections import Counter
from dataclasses import replace

import pytest

from pipeline.config import RunConfig
from pipeline.data import canvases as module
from pipeline.data.canvases import Canvas, choose_canvases
from pipeline.data.loader import training_batches
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from shards.dataset.manifest import Manifest, load_manifest
from shards.plan.steps import START, Origin


@pytest.fixture
def manifest(tiny_config: RunConfig) -> Manifest:
    return load_manifest(tiny_config.data.train)


def schedule_of(config: RunConfig, manifest: Manifest, origin: Origin = START) -> Schedule:
    return Schedule(config.optim, manifest.images, config.data.epoch_tail, origin)


def made(config: RunConfig, manifest: Manifest, workers: int, origin: Origin) -> Counter[Canvas]:
    """Return how often the loaders of all ranks make each canvas."""
    schedule, step = schedule_of(config, manifest, origin), origin.step
    found: Counter[Canvas] = Counter()
    for rank in range(workers):
        for batches in training_batches(manifest, config, schedule, Ranks(rank, workers), step, schedule.total_steps):
            found.update(Canvas(len(batch), *batch.images.shape[2:]) for batch in batches if len(batch))
    return found


def varied(config: RunConfig, **compute: int) -> RunConfig:
    """Return the run with images of several sizes."""
    transform = replace(config.transform, train_scales=(32, 48, 64), max_size=96)
    return replace(config, transform=transform, compute=replace(config.compute, graphs=True, **compute))


@pytest.mark.parametrize(
    ("workers", "microbatch", "tail", "origin"),
    [
        (1, 0, "straddle", START),
        (2, 0, "straddle", START),
        (3, 1, "straddle", Origin(2, 9)),
        (2, 1, "short", START),
        (4, 0, "short", Origin(4, 14)),
    ],
)
def test_the_plan_counts_the_canvases_that_the_loaders_make(
    tiny_config: RunConfig, manifest: Manifest, workers: int, microbatch: int, tail: str, origin: Origin
) -> None:
    config = varied(tiny_config, canvas_multiple=16, max_microbatch=microbatch, max_graphs=2)
    config = replace(
        config,
        data=replace(config.data, epoch_tail=tail),  # type: ignore[arg-type]
        optim=replace(config.optim, batch_size=5, epochs=3),
    )
    expected = made(config, manifest, workers, origin)
    chosen = choose_canvases(manifest, config, schedule_of(config, manifest, origin), workers)
    assert (chosen.passes, chosen.distinct) == (expected.total(), len(expected))
    most = sorted(expected.values(), reverse=True)[:2]
    assert [expected[canvas] for canvas in chosen.canvases] == most
    assert chosen.hit_rate == pytest.approx(sum(most) / expected.total())
    left = [canvas.pixels for canvas in expected if canvas not in chosen.canvases]
    assert chosen.largest_left == max(left, default=0)


def test_a_multiple_with_enough_hits_is_named(tiny_config: RunConfig, manifest: Manifest) -> None:
    few = varied(tiny_config, canvas_multiple=1, max_graphs=1)
    chosen = choose_canvases(manifest, few, schedule_of(few, manifest), 1)
    assert chosen.hit_rate < 0.95
    assert str(chosen).endswith(f"; --compute.canvas-multiple {chosen.better_multiple} has more")
    better = replace(few, compute=replace(few.compute, canvas_multiple=chosen.better_multiple))
    found = choose_canvases(manifest, better, schedule_of(better, manifest), 1)
    assert (found.hit_rate, found.better_multiple) == (1.0, 0)
    assert "CUDA graphs for 1 of 1 canvases, expected for 100.0% of the passes" in str(found)


def test_counting_ends_with_the_epoch_that_holds_enough(
    tiny_config: RunConfig, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = varied(tiny_config)
    config = replace(config, optim=replace(config.optim, batch_size=4, epochs=300))
    monkeypatch.setattr(module, "_ENOUGH", 4)
    assert choose_canvases(manifest, config, schedule_of(config, manifest), 1).passes == 6


def test_a_finished_run_has_no_canvas(tiny_config: RunConfig, manifest: Manifest) -> None:
    config = varied(tiny_config)
    chosen = choose_canvases(manifest, config, schedule_of(config, manifest, Origin(99, 999)), 1)
    assert (chosen.canvases, chosen.hit_rate, chosen.passes) == ((), 0.0, 0)
