"""Two ranks that save without pause, killed at random moments: the newest checkpoint is whole and is what was saved."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Location, Url
from pipeline.checkpoint.metadata import read_meta
from pipeline.checkpoint.pruning import prune
from pipeline.checkpoint.saver import Saver
from pipeline.distributed.ranks import Ranks
from shards.store import storage
from tests.support.checkpoints import meta
from tests.support.ranks import started_ranks
from tests.support.s3_server import S3Server

SIDE = 1450  # four square matrices with AdamW's two moments: 100 MB
Run = tuple[nn.Module, torch.optim.Optimizer]


def made(side: int) -> Run:
    model = nn.Sequential(*(nn.Linear(side, side) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def fill(run: Run, step: int) -> None:
    """The state after `step`: every number says which."""
    model, optimizer = run
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
            optimizer.state[parameter]["exp_avg"].fill_(step + 0.25)
            optimizer.state[parameter]["exp_avg_sq"].fill_(step + 0.5)


def assert_is_of(run: Run, step: int) -> None:
    for parameter in run[0].parameters():
        moments = run[1].state[parameter]
        assert (parameter == step).all()
        assert (moments["exp_avg"] == step + 0.25).all()
        assert (moments["exp_avg_sq"] == step + 0.5).all()


def train(ranks: Ranks, root: Location, side: int, environment: dict[str, str]) -> None:
    """Go on from the newest checkpoint and save after every second step, for ever."""
    os.environ.update(environment)  # the processes fork from a server that may be older than the store
    run = made(side)
    newest = ranks.broadcast(catalog.newest(root))
    step = 0
    if newest is not None:
        checkpoint_state.load(newest, *run, ranks)
        step = read_meta(newest).step
        assert_is_of(run, step)
    with Saver(root, run[1], ranks, keep=2) as saver:
        while True:
            run[1].step()  # without gradients: what waits for the copy of the last save
            step += 1
            fill(run, step)
            ranks.sum(torch.ones(1))
            if step % 2 == 0:
                saver.save(*run, meta(step, world_size=2))


def newest_step(root: Location) -> int:
    newest = catalog.newest(root)
    return 0 if newest is None else read_meta(newest).step


def unfinished(root: Location) -> list[Path]:
    """Folders of checkpoints that are not whole."""
    assert isinstance(root, Path)
    left = root.glob("checkpoints/*.partial")
    return [path for path in left if not path.name.endswith(".deleted.partial")]


def kill_at_random(root: Location, side: int, chance: random.Random, *, aimed: bool = False, **environment: str) -> int:
    """Start the ranks, kill both or one of them at a random moment, end the other; the newest step afterwards.

    aimed: at the next moment, after that one, in which a checkpoint is being written.
    """
    begun = newest_step(root)
    with started_ranks(2, train, root, side, environment) as (processes, receivers):
        until = time.monotonic() + 240
        while newest_step(root) == begun:
            assert not receivers[0].poll(), receivers[0].recv_bytes().decode(errors="replace")
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.8))
        while aimed and not unfinished(root) and time.monotonic() < until:
            time.sleep(0.001)
        before = newest_step(root)
        doomed = chance.choice([processes, processes[:1], processes[1:]])
        for process in doomed:
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
        for process in doomed:
            process.join()
        time.sleep(0.2)  # what the other one does with it
        for process in processes:
            process.kill()  # as Ray does
    step = newest_step(root)
    assert step >= before > begun
    run = made(side)
    newest = catalog.newest(root)
    assert newest is not None
    checkpoint_state.load(newest, *run, Ranks())
    assert_is_of(run, step)
    return step


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_after_kills_in_the_middle_of_writing_the_newest_is_whole(tmp_path: Path, kills: int) -> None:
    chance = random.Random(kills)
    hits, steps = 0, [0]
    for number in range(kills):
        steps.append(kill_at_random(tmp_path, SIDE, chance, aimed=number % 2 == 0))
        hits += bool(unfinished(tmp_path))
        assert len(unfinished(tmp_path)) <= 1  # those of the kills before are gone
    assert steps == sorted(set(steps))
    print(f"{hits} of {kills} kills left an unfinished checkpoint")
    assert hits >= kills / 2, "the kills did not hit the writing"


@pytest.mark.slow
def test_after_kills_in_the_middle_of_uploading_the_newest_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server(tmp_path, written=True)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_CONFIG_FILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    root = Url("s3://sets/runs/tiny-1")
    try:
        chance, step = random.Random(3), 0
        for _ in range(5):
            step = kill_at_random(root, SIDE // 2, chance, **server.environment)
        prune(catalog.Shelf(root).look(), keep=1)
        assert newest_step(root) == step
        names = {name.rpartition("/")[2] for name in storage.listing(str(root))}
        assert names == {"meta.json", ".metadata", "__0_0.distcp", "__1_0.distcp"}
        assert len(storage.listing(str(root))) == 4
    finally:
        server.stop()
        fsspec.filesystem("s3").clear_instance_cache()
