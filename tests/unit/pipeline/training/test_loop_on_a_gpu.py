"""The loop of a run on a GPU that is pretended: steps, averages, evaluation, checkpoints, and a resume."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from detr import batch, kept, position
from pipeline.checkpoint import saver
from pipeline.config import RunConfig
from pipeline.data import loader
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RunConfigError
from pipeline.training.graphs import planned
from pipeline.training.loop import run
from tests.support.pretended_gpu import HostStager, PretendedGpu, pretended_gpu
from tests.support.repeated import RepeatedWork
from tests.support.runs import assert_same, start, weights
from tests.support.tracker import MemoryTracker

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
STEPS, BATCHES = 6, 3
RATES = (planned.EXPECTED, planned.HIT_RATE)


@pytest.fixture
def quiet(config: RunConfig) -> RunConfig:
    """Run without dropout, whose draws differ between devices, and without pictures."""
    return replace(
        config,
        model=replace(config.model, dropout=0.0),
        optim=replace(config.optim, ema=0.9),
        evaluate=replace(config.evaluate, every=2, explain=False, pictures=0),
        track=replace(config.track, log_every=3),
    )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    monkeypatch.setattr(saver, "DefaultStager", HostStager)
    with pretended_gpu() as pretended:
        yield pretended
    for cache in (batch._scale_and_shift, position._kept_sine_grid, kept.constant):
        cache.cache_clear()


def curves(tracker: MemoryTracker) -> dict[tuple[str, int], float]:
    return {(name, step): value for name, value, step in tracker.points if name.startswith(("train/", "val/"))}


def test_a_run_on_a_gpu_has_the_curves_of_the_host_and_resumes_bit_for_bit(
    quiet: RunConfig, tmp_path: Path, gpu: PretendedGpu
) -> None:
    trackers = {device: MemoryTracker() for device in (CPU, GPU)}
    for device, tracker in trackers.items():
        gpu.waits.clear()
        run(quiet, start(quiet, tmp_path / device.type), Ranks(device=device), tracker)
    expected, found = curves(trackers[CPU]), curves(trackers[GPU])
    assert found.keys() == expected.keys()
    assert {step for _, step in found} == {2, 3, 4, 6}
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert all(name.device == CPU for name in weights(quiet, tmp_path / "cuda").values())
    # The saver waits in a thread of its own; the meter at log points, for the device's clock and its sums.
    waits = Counter(event.file for event in gpu.waits)
    assert waits["detr/matcher.py"] == waits["pipeline/training/step.py"] == STEPS
    assert waits["pipeline/tracking/meter.py"] == 2 * 4
    assert waits["pipeline/evaluation/evaluate_model.py"] == BATCHES
    others = {"detr/matcher.py", "pipeline/training/step.py", "pipeline/tracking/meter.py"}
    assert waits.keys() - others == {"pipeline/evaluation/evaluate_model.py", "pipeline/checkpoint/saver.py"}
    assert not gpu.strays
    interrupted = start(quiet, tmp_path / "interrupted")
    for steps in (4, 0):
        changed = replace(quiet, optim=replace(quiet.optim, max_steps=steps))
        run(changed, interrupted, Ranks(device=GPU), None)
    assert_same(weights(quiet, tmp_path / "interrupted"), weights(quiet, tmp_path / "cuda"))


def test_a_thread_that_uses_the_gpu_of_another_worker_is_found(
    quiet: RunConfig, tmp_path: Path, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (loader, saver):
        monkeypatch.setattr(module, "use_device", lambda _: None)
    once = replace(quiet, optim=replace(quiet.optim, ema=0.0, max_steps=1), evaluate=replace(quiet.evaluate, limit=1))
    run(once, start(once, tmp_path), Ranks(device=GPU), None)
    assert {stray.partition("_")[0] for stray in gpu.strays} == {"shards", "saver"}


def test_a_run_with_graphs_has_the_curves_of_one_without_and_reports_its_hits(
    quiet: RunConfig, tmp_path: Path, gpu: PretendedGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recorder repeats the work; one of the canvases is captured, the most frequent."""
    monkeypatch.setattr(planned, "CudaCapture", RepeatedWork)
    quiet = replace(
        quiet,
        compute=replace(quiet.compute, canvas_multiple=16),
        optim=replace(quiet.optim, ema=0.0, max_steps=3),
        evaluate=replace(quiet.evaluate, limit=1),
    )
    graphed = replace(quiet, compute=replace(quiet.compute, graphs=True, max_graphs=1))
    trackers = [MemoryTracker(), MemoryTracker()]
    waits = []
    for config, tracker, name in zip((quiet, graphed), trackers, ("plain", "graphed"), strict=True):
        gpu.waits.clear()
        run(config, start(config, tmp_path / name), Ranks(device=GPU), tracker)
        waits.append(Counter(event.file for event in gpu.waits))
    assert waits[0] == waits[1]
    assert curves(trackers[1]) == pytest.approx(curves(trackers[0]), rel=1e-4, abs=1e-4)
    points = {name: [(value, step) for found, value, step in trackers[1].points if found == name] for name in RATES}
    (expected, _), rates = points[planned.EXPECTED][0], points[planned.HIT_RATE]
    assert 0 < expected < 1
    steps = [step for _, step in rates]
    hits = sum(rate * (step - before) for (rate, step), before in zip(rates, [0, *steps[:-1]], strict=True))
    assert hits / steps[-1] == pytest.approx(expected)


def test_graphs_without_a_gpu_are_refused_in_one_line(quiet: RunConfig, tmp_path: Path) -> None:
    config = replace(quiet, compute=replace(quiet.compute, graphs=True))
    with pytest.raises(RunConfigError, match=r"compute\.graphs is True on a worker that trains on cpu"):
        run(config, start(config, tmp_path / "run"), Ranks(), None)
