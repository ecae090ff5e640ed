"""A disk that is full, or that nothing can be written to any more, while two ranks save asynchronously."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.saver import Saver
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from tests.support.checkpoints import meta
from tests.support.ranks import run_ranks
from tests.support.small_disk import mounted, remount, run_on

HERE = "tests.integration.checkpoint.test_full_disk"
Run = tuple[nn.Module, torch.optim.Optimizer]


def made() -> Run:
    """A state of 3 MB."""
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return model, optimizer


def train(ranks: Ranks, root: Path, read_only_after: int) -> str:
    """Save after each of six steps; what ends it."""
    run = made()
    try:
        with Saver(root, run[1], ranks, keep=99) as saver:
            for step in range(1, 7):
                run[1].step()
                with torch.no_grad():
                    for parameter in run[0].parameters():
                        parameter.fill_(step)
                saver.save(*run, meta(step, world_size=2))
                if step == read_only_after:
                    saver.finish()
                    if ranks.first:
                        remount(root, "ro")
                    ranks.barrier()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def outlive(*disks: str) -> None:
    """On each disk, print what every rank says in the end, and which checkpoints are there; load all of them.

    The second disk can be read only after two steps.
    """
    for root, read_only_after in zip(map(Path, disks), (0, 2), strict=True):
        print("\n".join(run_ranks(2, train, root, read_only_after)))
        for number, path in enumerate(catalog.list_checkpoints(root), start=1):
            run = made()
            checkpoint_state.load(path, *run, Ranks())
            assert all((parameter == number).all() for parameter in run[0].parameters())
        print(*(path.name for path in sorted((root / "checkpoints").iterdir())))


def test_a_full_disk_is_one_line_on_every_rank_and_earlier_checkpoints_load(tmp_path: Path) -> None:
    disks = {tmp_path / "small": 11, tmp_path / "locked": 50}
    lines = run_on(mounted(disks), f"{HERE}:outlive", *map(str, disks)).splitlines()
    for whole, reason, (first, second, names) in (
        (3, "No space left on device", lines[:3]),
        (2, "Read-only file system", lines[3:]),
    ):
        assert first == second
        assert f"step-0000000{whole + 1} could not be written" in first
        assert reason in first
        assert first.endswith("are intact: free disk space there and make it writable, then `detr resume`")
        assert names.split() == [f"step-0000000{number}" for number in range(1, whole + 1)]
