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

from pipeline import checkpoint, checkpoint_store
from pipeline.errors import CheckpointError
from pipeline.meta import Best
from pipeline.parallel import Ranks
from shards import storage


def small(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer that have taken a step, so that there is state to keep."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.rand(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def meta(step: int) -> checkpoint.Meta:
    return checkpoint.Meta(
        step=step,
        epoch=step / 4,
        samples=step * 2,
        run_id="r",
        seed=1,
        batch_size=2,
        train_digest="d",
        num_classes=2,
        code_commit="c",
        world_size=1,
        versions={"torch": "2.11"},
    )


def save(folder: Path, step: int, seed: int = 0) -> Path:
    return checkpoint.save(folder, *small(seed), meta(step), Ranks())


def assert_same(one: tuple[nn.Module, torch.optim.Optimizer], other: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    for name, value in one[0].state_dict().items():
        assert torch.equal(value, other[0].state_dict()[name]), name
    states = [optimizer.state_dict()["state"] for _, optimizer in (one, other)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][key]) for key, value in state.items())


def test_what_is_saved_is_loaded_bit_for_bit_with_the_optimizer_s_state(tmp_path: Path) -> None:
    path = save(tmp_path, 3, seed=1)
    other = small(2)
    checkpoint.load(path, *other, Ranks())
    assert_same(other, small(1))
    assert checkpoint.read_meta(path) == meta(3)
    assert not list(tmp_path.rglob("*.partial"))


def test_weights_alone_are_loaded_into_a_model(tmp_path: Path) -> None:
    model, _ = small(2)
    checkpoint.load_weights(save(tmp_path, 3, seed=1), model)
    assert torch.equal(model.state_dict()["0.weight"], small(1)[0].state_dict()["0.weight"])


def test_the_newest_is_that_of_the_highest_step_and_unfinished_ones_do_not_count(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for step in (900, 1000, 200):
        save(tmp_path, step)
    save(tmp_path, 5000).rename(tmp_path / "checkpoints" / "step-00005000.partial")
    save(tmp_path, 6000).joinpath("meta.json").unlink()
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == [
        "step-00000200",
        "step-00000900",
        "step-00001000",
    ]
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 1000)


def test_what_a_killed_attempt_left_is_replaced(tmp_path: Path) -> None:
    aside = tmp_path / "checkpoints" / "step-00000003.partial"
    aside.mkdir(parents=True)
    (aside / "old").write_text("half")
    path = save(tmp_path, 3)
    save(tmp_path, 3, seed=5)  # computed a second time, after its first was saved
    assert not aside.exists()
    assert not (path / "old").exists()
    model, optimizer = small(9)
    checkpoint.load(path, model, optimizer, Ranks())
    assert_same((model, optimizer), small(5))


WRITER = """
import sys, pathlib
sys.path[:0] = sys.argv[2:]
import torch
from torch import nn
from pipeline import checkpoint
from pipeline.parallel import Ranks
from test_checkpoint import meta
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
    checkpoint.save(pathlib.Path(sys.argv[1]), model, optimizer, meta(step), Ranks())
    print(step, flush=True)
"""


def test_after_a_kill_in_the_middle_of_writing_the_newest_is_whole(tmp_path: Path) -> None:
    root = Path(checkpoint.__file__).parent.parent
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(40)))
    optimizer = torch.optim.AdamW(model.parameters())
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), str(root), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert process.stdout
    try:
        for _ in range(3):
            done = int(process.stdout.readline())
        # The fourth is under way; wait until its folder is there, then kill without warning.
        aside = checkpoint.folder_of(tmp_path, done + 1).with_suffix(".partial")
        until = time.monotonic() + 20
        while not aside.exists() and time.monotonic() < until:
            done = max([done, *(int(path.name.split("-")[1]) for path in checkpoint.list_checkpoints(tmp_path))])
            aside = checkpoint.folder_of(tmp_path, done + 1).with_suffix(".partial")
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    newest = checkpoint.newest(tmp_path)
    assert newest is not None
    checkpoint.load(newest, model, optimizer, Ranks())
    step = checkpoint.read_meta(newest).step
    assert step >= 3
    assert all((value == step).all() for value in model.state_dict().values())


def test_figures_are_kept_beside_the_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    assert checkpoint.read_evaluation(path) is None
    checkpoint.write_evaluation(path, {"AP": 0.25, "APs": -1.0})
    assert checkpoint.read_evaluation(path) == {"AP": 0.25, "APs": -1.0}
    assert not list(path.glob("*.partial"))


def test_the_best_has_the_highest_ap_and_is_the_newest_of_equals(tmp_path: Path) -> None:
    assert checkpoint.best(tmp_path) is None
    for step, ap in ((1, 0.1), (2, 0.4), (3, 0.4), (4, 0.3)):
        checkpoint.write_evaluation(save(tmp_path, step), {"AP": ap})
    save(tmp_path, 5)  # not evaluated
    found = checkpoint.best(tmp_path)
    assert found is not None
    assert (found[0].name, found[1]["AP"]) == ("step-00000003", 0.4)


def test_the_best_of_a_run_with_masks_has_the_highest_ap_of_masks(tmp_path: Path) -> None:
    for step, ap, mask_ap in ((1, 0.4, 0.1), (2, 0.3, 0.2), (3, 0.5, 0.0)):
        checkpoint.write_evaluation(save(tmp_path, step), {"AP": ap, "mask_AP": mask_ap})
    found = checkpoint.best(tmp_path)
    assert found is not None
    assert found[0].name == "step-00000002"


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        path = save(tmp_path, step)
        if step in (2, 4):
            checkpoint.write_evaluation(path, {"AP": 1 / step})
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000005",
        "step-00000006",
    ]
    checkpoint.prune(tmp_path, keep=2)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 3


def test_pruning_keeps_milestones_for_good(tmp_path: Path) -> None:
    for step in range(1, 6):
        said = msgspec.structs.replace(meta(step), milestone=step in (1, 3))
        checkpoint.save(tmp_path, *small(0), said, Ranks())
        checkpoint.prune(tmp_path, keep=1)
    assert [path.name[-1] for path in checkpoint.list_checkpoints(tmp_path)] == ["1", "3", "5"]


def test_what_cannot_be_read_for_the_time_being_is_not_pruned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(1, 6):
        said = msgspec.structs.replace(meta(step), milestone=step == 1, evaluate=step == 2)
        checkpoint.save(tmp_path, *small(0), said, Ranks())
    read = storage.read

    def busy(url: str) -> bytes:
        if "step-00000001/meta" in url or "step-00000002/meta" in url:
            raise OSError(24, "Too many open files")
        return read(url)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read", busy)
        checkpoint.prune(tmp_path, keep=2)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 5
    assert "Too many open files" in caplog.text
    caplog.clear()
    discard = checkpoint_store.discard

    def held(path: Path) -> None:
        if path.name.endswith("3"):
            raise PermissionError(13, "Permission denied")
        discard(path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_store, "discard", held)
        checkpoint.prune(tmp_path, keep=1)
    assert [path.name[-1] for path in checkpoint.list_checkpoints(tmp_path)] == ["1", "2", "3", "5"], (
        "others are deleted"
    )
    assert "1 could not be deleted" in caplog.text
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name[-1] for path in checkpoint.list_checkpoints(tmp_path)] == ["1", "2", "5"]


def test_pruning_clears_what_kills_left_in_the_middle_of_writing_and_of_pruning(tmp_path: Path) -> None:
    save(tmp_path, 1).rename(tmp_path / "checkpoints" / "step-00000001.deleted.partial")
    save(tmp_path, 5).rename(tmp_path / "checkpoints" / "step-00000005.partial")
    save(tmp_path, 2)
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"step": "three"}', msgspec.json.encode(msgspec.to_builtins(meta(3)) | {"new": 1})]
)
def test_a_damaged_meta_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 3)
    (path / "meta.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"meta\.json cannot be read .*expected a whole checkpoint") as caught:
        checkpoint.read_meta(path)
    assert "\n" not in str(caught.value)


def test_what_format_1_wrote_is_read_as_it_was(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    known = ("step", "epoch", "samples", "run_id", "seed", "batch_size", "train_digest", "num_classes", "code_commit")
    old = {name: getattr(meta(3), name) for name in (*known, "world_size", "versions")} | {"format": 1}
    (path / "meta.json").write_bytes(msgspec.json.encode(old))
    read = checkpoint.read_meta(path)
    assert read == msgspec.structs.replace(meta(3), format=1)
    assert (read.configuration(), read.best, read.ema, read.milestone, read.part) == (None, None, False, False, "")
    checkpoint.load_weights(path, small(2)[0])


def test_a_checkpoint_says_the_best_ap_so_far_and_its_step(tmp_path: Path) -> None:
    assert checkpoint.read_meta(save(tmp_path, 1)).best is None
    for step, ap in ((1, 0.2), (2, 0.5), (3, 0.3)):
        checkpoint.write_evaluation(save(tmp_path, step), {"AP": 0.9 - ap, "mask_AP": ap})
    assert checkpoint.read_meta(save(tmp_path, 4)).best == Best(2, 0.5)


def test_figures_that_cannot_be_written_are_one_clear_error(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / "evaluation.json").mkdir()
    with pytest.raises(CheckpointError, match=r"evaluation\.json could not be written .*checkpoint itself is intact"):
        checkpoint.write_evaluation(path, {"AP": 0.1})


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
        lambda: checkpoint.load(path, *small(0), Ranks()),
        lambda: checkpoint.load_weights(path, small(0)[0]),
    ):
        with pytest.raises(CheckpointError, match=r"does not fit this model or is damaged") as caught:
            load()
        assert "\n" not in str(caught.value)


def test_another_model_s_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    with pytest.raises(CheckpointError, match="does not fit this model or is damaged"):
        checkpoint.load_weights(path, nn.Linear(3, 3))


@dataclass
class Bomb:
    target: Path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


def test_loading_runs_no_code_that_a_checkpoint_brings(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    (path / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "harm")))
    with pytest.raises(CheckpointError):
        checkpoint.load(path, *small(0), Ranks())
    assert not (tmp_path / "harm").exists()


def test_loading_runs_no_code_that_a_value_brings(tmp_path: Path) -> None:
    model, optimizer = small(1)
    optimizer.param_groups[0]["note"] = Bomb(tmp_path / "harm")
    path = checkpoint.save(tmp_path, model, optimizer, meta(3), Ranks())
    model, optimizer = small(2)
    optimizer.param_groups[0]["note"] = "harmless"
    with pytest.raises(CheckpointError):
        checkpoint.load(path, model, optimizer, Ranks())
    assert not (tmp_path / "harm").exists()


def test_a_checkpoint_that_cannot_be_written_says_so_and_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_distributed", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left.*earlier checkpoints are intact"):
        save(tmp_path, 2)
    assert not list(tmp_path.rglob("*.partial"))  # it may be what fills the disk
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 1)
