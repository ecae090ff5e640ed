"""State of a checkpoint, written and loaded, after kills and with damage."""

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoint import catalog, torch_files
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.metadata import Best, read_meta
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from tests.support.checkpoints import assert_same_state, meta, save_checkpoint, save_small, small


def test_saved_state_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    path = save_small(tmp_path, 3, seed=1)
    other = small(2)
    checkpoint_state.load(path, *other, Ranks())
    assert_same_state(other, small(1))
    assert read_meta(path) == meta(3)
    assert not list(tmp_path.rglob("*.partial"))


def test_weights_are_loaded_without_the_optimizer(tmp_path: Path) -> None:
    model, _ = small(2)
    checkpoint_state.load_weights(save_small(tmp_path, 3, seed=1), model)
    assert torch.equal(model.state_dict()["0.weight"], small(1)[0].state_dict()["0.weight"])


def test_the_remains_of_a_killed_attempt_are_replaced(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "step-00000003.partial"
    partial.mkdir(parents=True)
    (partial / "old").write_text("half")
    path = save_small(tmp_path, 3)
    save_small(tmp_path, 3, seed=5)  # a step that was computed and saved a second time
    assert not partial.exists()
    assert not (path / "old").exists()
    model, optimizer = small(9)
    checkpoint_state.load(path, model, optimizer, Ranks())
    assert_same_state((model, optimizer), small(5))


WRITER = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
import torch
from torch import nn
from pipeline.distributed.ranks import Ranks
from tests.support.checkpoints import meta, save_checkpoint
model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(40)))
optimizer = torch.optim.AdamW(model.parameters())
sum(p.sum() for p in model.parameters()).backward()
optimizer.step()
step = 0
while True:
    step += 1
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(step)
    save_checkpoint(pathlib.Path(sys.argv[1]), model, optimizer, meta(step), Ranks())
    print(step, flush=True)
"""


def test_a_kill_during_writing_leaves_the_newest_complete(tmp_path: Path) -> None:
    root = Path(catalog.__file__).parents[2]
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(40)))
    optimizer = torch.optim.AdamW(model.parameters())
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(root)], stdout=subprocess.PIPE)
    assert process.stdout
    try:
        for _ in range(3):
            done = int(process.stdout.readline())
        # The fourth is being written: kill it as soon as its folder exists.
        partial = catalog.folder_of(tmp_path, done + 1).with_suffix(".partial")
        until = time.monotonic() + 120
        while not partial.exists() and time.monotonic() < until:
            done = max([done, *(int(path.name.split("-")[1]) for path in catalog.list_checkpoints(tmp_path))])
            partial = catalog.folder_of(tmp_path, done + 1).with_suffix(".partial")
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    newest = catalog.newest(tmp_path)
    assert newest is not None
    checkpoint_state.load(newest, model, optimizer, Ranks())
    step = read_meta(newest).step
    assert step >= 3
    assert all((value == step).all() for value in model.state_dict().values())


def test_metadata_has_the_best_ap_so_far_and_its_step(tmp_path: Path) -> None:
    assert read_meta(save_small(tmp_path, 1)).best is None
    for step, ap in ((1, 0.2), (2, 0.5), (3, 0.3)):
        catalog.write_evaluation(save_small(tmp_path, step), {"AP": 0.9 - ap, "mask_AP": ap})
    assert read_meta(save_small(tmp_path, 4)).best == Best(2, 0.5)


def shortened(path: Path) -> None:
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:900])


def without_data(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def without_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def empty_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(b"")


@pytest.mark.parametrize("damage", [shortened, without_data, without_metadata, empty_metadata])
def test_a_damaged_checkpoint_is_one_clear_error(tmp_path: Path, damage: object) -> None:
    path = save_small(tmp_path, 3)
    damage(path)  # type: ignore[operator]
    for load in (
        lambda: checkpoint_state.load(path, *small(0), Ranks()),
        lambda: checkpoint_state.load_weights(path, small(0)[0]),
    ):
        with pytest.raises(CheckpointError, match=r"does not fit this model or is damaged") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_another_model_s_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = save_small(tmp_path, 3)
    with pytest.raises(CheckpointError, match="does not fit this model or is damaged"):
        checkpoint_state.load_weights(path, nn.Linear(3, 3))


@dataclass
class Bomb:
    target: Path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_loading_runs_no_code_from_the_metadata(tmp_path: Path) -> None:
    path = save_small(tmp_path, 3)
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "harm")))
    with pytest.raises(CheckpointError):
        checkpoint_state.load(path, *small(0), Ranks())
    assert not (tmp_path / "harm").exists()


def test_loading_runs_no_code_from_a_value(tmp_path: Path) -> None:
    model, optimizer = small(1)
    optimizer.param_groups[0]["note"] = Bomb(tmp_path / "harm")
    path = save_checkpoint(tmp_path, model, optimizer, meta(3), Ranks())
    model, optimizer = small(2)
    optimizer.param_groups[0]["note"] = "harmless"
    with pytest.raises(CheckpointError):
        checkpoint_state.load(path, model, optimizer, Ranks())
    assert not (tmp_path / "harm").exists()


def test_a_failed_write_is_one_error_and_keeps_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_small(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_files, "save_distributed", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left.*earlier checkpoints are intact"):
        save_small(tmp_path, 2)
    assert not list(tmp_path.rglob("*.partial"))  # its files may be what fills the disk
    assert catalog.newest(tmp_path) == catalog.folder_of(tmp_path, 1)
