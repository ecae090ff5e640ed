"""Readers that are killed in the middle of an epoch, and others that go on from their last checkpoint."""

import multiprocessing
import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import RunConfig
from pipeline.data.loader import rank_slices
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from shards.config import ReadConfig, WriteConfig
from shards.dataset.manifest import load_manifest
from shards.read.loader import open_stream
from shards.read.sample import Sample
from shards.synthetic import write_synthetic
from shards.write.writer import write_coco

IMAGES, BATCH_SIZE, EPOCHS = 90, 4, 2
EVERY = 5  # steps between checkpoints
HELD = 12  # the step after which the readers stay until they are killed; the second a step earlier
_TIMEOUT_S = 60


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("readers")
    split = write_synthetic(root / "coco", train=IMAGES, val=1, size=64).train
    write_coco(split.images, split.annotations, root / "train", WriteConfig(samples_per_shard=20))
    return str(root / "train")


def read(config: RunConfig, ranks: Ranks, step: int, held: int | None, folder: Path) -> None:
    """Deliver from `step` on: a line per step, and one per checkpoint, each on the disk before the next."""
    manifest = load_manifest(config.data.train)
    schedule = Schedule(config.optim, manifest.images, config.data.epoch_tail)
    with (folder / f"rank-{ranks.rank}").open("w") as file:

        def note(*words: object) -> None:
            print(*words, file=file, flush=True)
            os.fsync(file.fileno())

        def seen(sample: Sample) -> str:
            return f"{sample.epoch}:{sample.image_id}"

        parts = rank_slices(manifest, config, schedule, ranks, step, schedule.total_steps)
        stream = open_stream(manifest, parts, transform=seen, collate=list, config=ReadConfig(threads=2))
        with closing(stream):
            for samples in stream:
                note("step", step, *samples)
                step += 1
                if step % EVERY == 0:
                    note("checkpoint", step)
                if held is not None and step > held - ranks.rank:
                    time.sleep(_TIMEOUT_S)


def start(
    config: RunConfig, world_size: int, folder: Path, step: int = 0, held: int | None = None
) -> list[multiprocessing.Process]:
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "pipeline.training.loop"])
    processes = [
        context.Process(target=read, args=(config, Ranks(rank, world_size), step, held, folder), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes  # type: ignore[return-value]


def lines(path: Path) -> list[list[str]]:
    # A line that a kill cut off was not delivered.
    return [line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def checkpoint(folder: Path) -> int:
    """Return the newest checkpoint that every rank has made, 0 before the first."""
    found = [
        max((int(words[1]) for words in lines(path) if words[0] == "checkpoint"), default=0)
        for path in folder.iterdir()
    ]
    return min(found, default=0)


def delivered(folder: Path, first: int = 0, until: int | None = None) -> list[str]:
    """Return `epoch:image id` of all images that any rank delivered in steps `first` to `until` - 1."""
    return [
        sample
        for path in folder.iterdir()
        for words in lines(path)
        if words[0] == "step" and first <= int(words[1]) and (until is None or int(words[1]) < until)
        for sample in words[2:]
    ]


def kill_at(processes: list[multiprocessing.Process], folder: Path, step: int) -> None:
    """Kill all processes once each has delivered `step`."""
    until = time.monotonic() + _TIMEOUT_S
    try:
        while not all(
            (folder / f"rank-{rank}").exists()
            and any(words[:2] == ["step", str(step - rank)] for words in lines(folder / f"rank-{rank}"))
            for rank in range(len(processes))
        ):
            assert time.monotonic() < until, "the readers deliver nothing"
            time.sleep(0.01)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL] * len(processes)


@pytest.mark.parametrize("options", [{}, {"sort_window": 3, "shuffle_shards": 2, "epoch_tail": "short"}])
def test_three_workers_that_replace_two_killed_show_every_image_once(
    tiny_config: RunConfig, train: str, tmp_path: Path, options: dict[str, object]
) -> None:
    config = replace(
        tiny_config,
        data=replace(tiny_config.data, train=train, **options),
        optim=replace(tiny_config.optim, batch_size=BATCH_SIZE, epochs=EPOCHS),
    )
    kill_at(start(config, 2, tmp_path / "two", held=HELD), tmp_path / "two", HELD)
    reached = checkpoint(tmp_path / "two")
    assert reached == 10, "not killed in the middle of the first epoch, some steps after a checkpoint"
    three = start(config, 3, tmp_path / "three", step=reached)
    for process in three:
        process.join(_TIMEOUT_S)
    assert [process.exitcode for process in three] == [0, 0, 0]

    shown = delivered(tmp_path / "two", until=reached) + delivered(tmp_path / "three")
    ids = load_manifest(train).index().images["image_id"].tolist()
    expected = [f"{epoch}:{image_id}" for epoch in range(EPOCHS) for image_id in ids]
    assert sorted(shown) == sorted(expected)
