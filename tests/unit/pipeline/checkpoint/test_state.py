import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.metadata import Best, read_meta
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from shards.store import storage
from tests.support.checkpoints import assert_same_state, meta, save_checkpoint, small


def save(folder: Path, step: int, seed: int = 0) -> Path:
    return save_checkpoint(folder, *small(seed), meta(step), Ranks())


def test_saved_state_is_loaded_bit_for_bit(tmp_path: Path) -> None:
    path = save(tmp_path, 3, seed=1)
    other = small(2)
    checkpoint_state.load(path, *other, Ranks())
    assert_same_state(other, small(1))
    assert read_meta(path) == meta(3)
    assert not list(tmp_path.rglob("*.partial"))


def test_weights_are_loaded_without_the_optimizer(tmp_path: Path) -> None:
    model, _ = small(2)
    checkpoint_state.load_weights(save(tmp_path, 3, seed=1), model)
    assert torch.equal(model.state_dict()["0.weight"], small(1)[0].state_dict()["0.weight"])


def test_the_newest_is_the_complete_checkpoint_of_the_highest_step(tmp_path: Path) -> None:
    assert catalog.newest(tmp_path) is None
    for step in (900, 1000, 200):
        save(tmp_path, step)
    save(tmp_path, 5000).rename(tmp_path / "checkpoints" / "step-00005000.partial")
    save(tmp_path, 6000).joinpath("meta.json").unlink()
    assert [path.name for path in catalog.list_checkpoints(tmp_path)] == [
        "step-00000200",
        "step-00000900",
        "step-00001000",
    ]
    assert catalog.newest(tmp_path) == catalog.folder_of(tmp_path, 1000)


def test_the_remains_of_a_killed_attempt_are_replaced(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "step-00000003.partial"
    partial.mkdir(parents=True)
    (partial / "old").write_text("half")
    path = save(tmp_path, 3)
    save(tmp_path, 3, seed=5)  # a step that was computed and saved a second time
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
        until = time.monotonic() + 20
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


def test_metrics_are_written_beside_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert catalog.read_evaluation(path) is None
    catalog.write_evaluation(path, {"AP": 0.25, "APs": -1.0})
    assert catalog.read_evaluation(path) == {"AP": 0.25, "APs": -1.0}
    assert not list(path.glob("*.partial"))


def test_the_best_is_the_newest_with_the_highest_ap(tmp_path: Path) -> None:
    assert catalog.best(tmp_path) is None
    for step, ap in ((1, 0.1), (2, 0.4), (3, 0.4), (4, 0.3)):
        catalog.write_evaluation(save(tmp_path, step), {"AP": ap})
    save(tmp_path, 5)  # not evaluated
    found = catalog.best(tmp_path)
    assert found is not None
    assert (found[0].name, found[1]["AP"]) == ("step-00000003", 0.4)


def test_with_masks_the_best_has_the_highest_mask_ap(tmp_path: Path) -> None:
    for step, ap, mask_ap in ((1, 0.4, 0.1), (2, 0.3, 0.2), (3, 0.5, 0.0)):
        catalog.write_evaluation(save(tmp_path, step), {"AP": ap, "mask_AP": mask_ap})
    found = catalog.best(tmp_path)
    assert found is not None
    assert found[0].name == "step-00000002"


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        path = save(tmp_path, step)
        if step in (2, 4):
            catalog.write_evaluation(path, {"AP": 1 / step})
    catalog.prune(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000005",
        "step-00000006",
    ]
    catalog.prune(tmp_path, keep=2)
    assert len(catalog.list_checkpoints(tmp_path)) == 3


def test_pruning_keeps_milestones(tmp_path: Path) -> None:
    for step in range(1, 6):
        milestone = meta(step, milestone=step in (1, 3))
        save_checkpoint(tmp_path, *small(0), milestone, Ranks())
        catalog.prune(tmp_path, keep=1)
    assert [path.name[-1] for path in catalog.list_checkpoints(tmp_path)] == ["1", "3", "5"]


def test_pruning_keeps_what_cannot_be_read_or_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, *small(0), meta(step, milestone=step == 1, evaluate=step == 2), Ranks())
    read = storage.read

    def busy(url: str) -> bytes:
        if "step-00000001/meta" in url or "step-00000002/meta" in url:
            raise OSError(24, "Too many open files")
        return read(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read", busy)
        catalog.prune(tmp_path, keep=2)
    assert len(catalog.list_checkpoints(tmp_path)) == 5
    assert "Too many open files" in caplog.text
    caplog.clear()
    discard = catalog.delete

    def held(path: Path) -> None:
        if path.name.endswith("3"):
            raise PermissionError(13, "Permission denied")
        discard(path)

    with monkeypatch.context() as patch:
        patch.setattr(catalog, "delete", held)
        catalog.prune(tmp_path, keep=1)
    assert [path.name[-1] for path in catalog.list_checkpoints(tmp_path)] == ["1", "2", "3", "5"], "others are deleted"
    assert "failed 1 times" in caplog.text
    catalog.prune(tmp_path, keep=1)
    assert [path.name[-1] for path in catalog.list_checkpoints(tmp_path)] == ["1", "2", "5"]


def test_pruning_removes_the_remains_of_kills(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "checkpoints" / "step-00000001.deleted.partial")
    save(tmp_path, 5).rename(tmp_path / "checkpoints" / "step-00000005.partial")
    save(tmp_path, 2)
    catalog.prune(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"step": "three"}',
        b'{"format": "three"}',
        msgspec.json.encode(msgspec.to_builtins(meta(3)) | {"new": 1}),
        msgspec.json.encode(msgspec.to_builtins(meta(3, config={"seed": 1, "data": 5}))),
        msgspec.json.encode(msgspec.to_builtins(meta(3)) | {"format": 2, "config": 7}),
    ],
)
def test_a_damaged_meta_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 3)
    (path / "meta.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"meta\.json cannot be read .*expected a complete checkpoint") as caught:
        read_meta(path)
    assert "\n" not in str(caught.value)


FORMAT_1 = b"""{"step": 3, "epoch": 0.75, "samples": 6, "run_id": "r", "seed": 1, "batch_size": 2, "train_digest": "d",
"num_classes": 2, "code_commit": "c", "world_size": 1, "versions": {"torch": "2.11"}, "format": 1}"""


def test_metadata_of_format_1_is_read(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "meta.json").write_bytes(FORMAT_1)
    config = {
        "seed": 1,
        "optim": {"batch_size": 2},
        "data": {"sort_window": 1, "shuffle_shards": 0, "epoch_tail": "straddle"},
    }
    read = read_meta(path)
    assert read == meta(3, config=config)
    assert (read.best, read.ema, read.milestone, read.state_folder) == (None, False, False, "")
    checkpoint_state.load_weights(path, small(2)[0])


def test_options_of_format_2_are_moved_into_the_configuration(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    fields = json.loads((path / "meta.json").read_text())
    del fields["state_folder"]
    fields["config"]["optim"] |= {"ema": 0.9, "batch_size": 7}
    fields |= {"format": 2, "seed": 3, "batch_size": 7, "sort_window": 2, "shuffle_shards": 4, "epoch_tail": "short"}
    (path / "meta.json").write_text(json.dumps(fields | {"ema": True, "part": "8f1c"}))
    read = read_meta(path)
    assert (read.format, read.ema, read.state_folder) == (3, True, "8f1c")
    assert (read.option("seed"), read.option("optim.batch_size")) == (3, 7)
    options = [read.option(f"data.{name}") for name in ("sort_window", "shuffle_shards", "epoch_tail")]
    assert options == [2, 4, "short"]


def test_metadata_has_the_best_ap_so_far_and_its_step(tmp_path: Path) -> None:
    assert read_meta(save(tmp_path, 1)).best is None
    for step, ap in ((1, 0.2), (2, 0.5), (3, 0.3)):
        catalog.write_evaluation(save(tmp_path, step), {"AP": 0.9 - ap, "mask_AP": ap})
    assert read_meta(save(tmp_path, 4)).best == Best(2, 0.5)


def test_metrics_that_cannot_be_written_are_one_clear_error(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "evaluation.json").mkdir()
    with pytest.raises(CheckpointError, match=r"evaluation\.json could not be written .*checkpoint itself is intact"):
        catalog.write_evaluation(path, {"AP": 0.1})


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
    path = save(tmp_path, 3)
    damage(path)  # type: ignore[operator]
    for load in (
        lambda: checkpoint_state.load(path, *small(0), Ranks()),
        lambda: checkpoint_state.load_weights(path, small(0)[0]),
    ):
        with pytest.raises(CheckpointError, match=r"does not fit this model or is damaged") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_another_model_s_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="does not fit this model or is damaged"):
        checkpoint_state.load_weights(path, nn.Linear(3, 3))


@dataclass
class Bomb:
    target: Path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_loading_runs_no_code_from_the_metadata(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
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
    save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_state, "save_distributed", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left.*earlier checkpoints are intact"):
        save(tmp_path, 2)
    assert not list(tmp_path.rglob("*.partial"))  # its files may be what fills the disk
    assert catalog.newest(tmp_path) == catalog.folder_of(tmp_path, 1)
