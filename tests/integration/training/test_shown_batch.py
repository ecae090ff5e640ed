"""The batch that `detr show-batch` draws is the one that workers train, bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs import cli
from pipeline.config import RunConfig
from pipeline.data.loader import global_batch
from pipeline.display.batches import batch_digest
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from pipeline.training import loop
from pipeline.training.state import RunInfo
from pipeline.training.step import StepResult
from shards.dataset.manifest import load_manifest
from tests.support.ranks import run_ranks
from tests.support.runs import start
from tests.support.tracker import MemoryTracker

STEPS = 5  # the last ones are in the second epoch


def train(ranks: Ranks, config: RunConfig, run_info: RunInfo) -> tuple[dict[int, list[str]], Any]:
    """Return the digests of the micro-batches that a rank trained, by step, and rank 0's table of the first."""
    seen: dict[int, list[str]] = {}
    train_step = loop.train_step

    def recorded(
        model: Any, batches: Any, optimizer: Any, config: Any, ranks: Any, step: int, *rest: Any
    ) -> StepResult:
        seen[step] = [batch_digest(batch) for batch in batches]
        return train_step(model, batches, optimizer, config, ranks, step, *rest)

    loop.train_step = recorded
    tracker = MemoryTracker() if ranks.first else None
    loop.run(config, run_info, ranks, tracker)
    return seen, None if tracker is None else tracker.tables["first_batch.json"]


def test_a_shown_batch_is_the_trained_one_also_of_two_workers(
    tiny_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(
        tiny_config,
        transform=replace(tiny_config.transform, crop=True),
        optim=replace(tiny_config.optim, batch_size=5, max_steps=STEPS),
        compute=replace(tiny_config.compute, max_microbatch=2),
        cluster=replace(tiny_config.cluster, workers=2),
    )
    (first, table), (second, _) = run_ranks(2, train, config, start(config, tmp_path / "run"))
    manifest = load_manifest(config.data.train)
    schedule = Schedule(config.optim, manifest.images, config.data.epoch_tail)
    for step in range(STEPS):
        shown = [list(map(batch_digest, of_rank)) for of_rank in global_batch(manifest, config, schedule, step, 2)]
        assert shown == [first[step], second[step]], f"step {step}"
    assert [len(of_rank) for of_rank in shown] == [2, 2]
    assert table["sha256"] == first[0] + second[0]
    flags = f"--step 3 --out {tmp_path / 'batch.png'} --data.train {config.data.train} --data.val {config.data.val}"
    flags += (
        " --optim.batch-size 5 --optim.max-steps 5 --compute.max-microbatch 2 --cluster.workers 2 --model.num-queries 8"
    )
    flags += " --transform.train-scales 48 64 --transform.max-size 64 --transform.eval-size 64"
    assert cli.run(["show-batch", "detr-r50", *flags.split()]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = [word for line in lines for word in line.split() if len(word) == 64]
    assert printed[1:] == first[3] + second[3] if printed[0].startswith("-") else printed == first[3] + second[3]
    assert (tmp_path / "batch.png").read_bytes().startswith(b"\x89PNG")
