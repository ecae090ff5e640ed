import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import checkpoint, saving
from pipeline.errors import CheckpointError
from pipeline.parallel import Ranks
from pipeline.saving import Saver, open_saver
from pipeline.stopping import Asked

Run = tuple[nn.Module, torch.optim.Optimizer]


def made(seed: int) -> Run:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step((model, optimizer))
    return model, optimizer


def step(run: Run) -> None:
    model, optimizer = run
    optimizer.zero_grad()
    model(torch.rand(3, 4)).sum().backward()
    optimizer.step()


def meta(number: int) -> checkpoint.Meta:
    return checkpoint.Meta(number, 1.0, number, "r", 1, 1, "d", 2, "c", 1, {})


def values(run: Run) -> dict[str, torch.Tensor]:
    model, optimizer = run
    moments = {
        f"{number}.{name}": value
        for number, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {name: value.clone() for name, value in {**model.state_dict(), **moments}.items()}


def loaded(folder: Path, number: int) -> dict[str, torch.Tensor]:
    run = made(99)
    checkpoint.load(checkpoint.folder_of(folder, number), *run, Ranks())
    return values(run)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Saver._stage

    def slowly(self: Saver, *arguments: object) -> object:
        time.sleep(0.3)
        return stage(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Saver, "_stage", slowly)


@pytest.mark.usefixtures("slow_copy")
def test_what_is_saved_is_the_state_of_the_call_though_training_goes_on(tmp_path: Path) -> None:
    """The forward pass moves the batch norm's statistics while the copy is made, and the update waits for it."""
    run = made(1)
    with open_saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        expected = []
        for number in range(3):
            expected.append(values(run))
            saver.save(*run, meta(number))
            step(run)
            step(run)
    for number, state in enumerate(expected):
        assert_same(loaded(tmp_path, number), state)
    assert saver.stalled_s > 0.5


def test_the_last_checkpoint_is_whole_when_the_block_ends_even_by_an_error(tmp_path: Path) -> None:
    run = made(1)
    expected = values(run)

    def fail_after_a_save() -> None:
        with open_saver(tmp_path, run[1], Ranks(), keep=1) as saver:
            saver.save(*run, meta(5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_a_save()
    assert_same(loaded(tmp_path, 5), expected)
    step(run)  # nothing of the saver is left in the optimizer
    assert not run[1]._optimizer_step_pre_hooks


def test_what_cannot_be_written_is_said_at_the_next_save_and_leaves_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with open_saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        saver.save(*run, meta(1))
        saver.finish()
        monkeypatch.setattr(saving.checkpoint, "save_distributed", full)
        saver.save(*run, meta(2))
        step(run)
        with pytest.raises(CheckpointError, match="No space left"):
            saver.save(*run, meta(3))
    assert checkpoint.newest(tmp_path) == checkpoint.folder_of(tmp_path, 1)


def test_only_rank_0_s_clock_asks_for_a_save_and_starts_anew_with_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = made(1), [100.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    with open_saver(tmp_path, run[1], Ranks(), keep=9, every_minutes=5) as saver:
        now[0] += 299
        assert saver.asked() == Asked()
        now[0] += 1
        assert saver.asked() == Asked(save=True)
        saver.save(*run, meta(1))
        saver.finish()
        now[0] += 299
        assert saver.asked() == Asked()
    for ranks, minutes in ((Ranks(), 0.0), (Ranks(1, 1), 1e-9)):
        with open_saver(tmp_path, run[1], ranks, keep=9, every_minutes=minutes) as saver:
            assert saver.asked() == Asked()


def test_the_clock_does_not_ask_while_a_checkpoint_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, go_on = made(1), threading.Event()
    monkeypatch.setattr(saving.checkpoint, "write", lambda *_: go_on.wait(10))
    with open_saver(tmp_path, run[1], Ranks(), keep=9, every_minutes=1e-9) as saver:
        saver.save(*run, meta(1))
        assert saver.asked() == Asked()
        go_on.set()
        saver.finish()
        assert saver.asked() == Asked(save=True)


def test_a_rank_that_could_not_write_asks_all_to_hear_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving.checkpoint, "save_distributed", full)
    saver = Saver(tmp_path, run[1], Ranks(), keep=9)
    saver.save(*run, meta(1))
    assert saver._writing is not None
    assert isinstance(saver._writing.exception(10), CheckpointError)
    assert saver.asked() == Asked(save=True)
    saver.close()


def test_no_more_than_asked_for_are_kept(tmp_path: Path) -> None:
    run = made(1)
    with open_saver(tmp_path, run[1], Ranks(), keep=2) as saver:
        for number in range(5):
            saver.save(*run, meta(number))
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
