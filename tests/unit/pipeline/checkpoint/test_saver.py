import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoint import catalog, torch_files
from pipeline.checkpoint import saver as checkpoint_saver
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.saver import Saver
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from tests.support.checkpoints import meta

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
    checkpoint_state.load(catalog.folder_of(folder, number), *run, Ranks())
    return values(run)


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, value in actual.items() if not torch.equal(value, expected[name])] == []


@pytest.fixture
def slow_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Saver._stage

    def slowly(self: Saver, *arguments: object) -> object:
        time.sleep(0.3)
        return stage(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Saver, "_stage", slowly)


@pytest.mark.usefixtures("slow_copy")
def test_a_checkpoint_has_the_state_of_the_time_of_the_call(tmp_path: Path) -> None:
    """Forward passes change batch norm statistics during the copy, and the optimizer's update waits for the copy."""
    run = made(1)
    with Saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        expected = []
        for number in range(3):
            expected.append(values(run))
            saver.save(*run, meta(number))
            step(run)
            step(run)
    for number, state in enumerate(expected):
        assert_same(loaded(tmp_path, number), state)
    assert saver.stalled_s > 0.5


def test_leaving_the_block_completes_the_last_checkpoint_even_on_error(tmp_path: Path) -> None:
    run = made(1)
    expected = values(run)

    def fail_after_a_save() -> None:
        with Saver(tmp_path, run[1], Ranks(), keep=1) as saver:
            saver.save(*run, meta(5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_after_a_save()
    assert_same(loaded(tmp_path, 5), expected)
    step(run)  # the saver's hook is gone from the optimizer
    assert not run[1]._optimizer_step_pre_hooks


def test_the_next_save_raises_a_failed_write_and_keeps_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made(1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with Saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        saver.save(*run, meta(1))
        saver.finish()
        monkeypatch.setattr(torch_files, "save_distributed", full)
        saver.save(*run, meta(2))
        step(run)
        with pytest.raises(CheckpointError, match="No space left"):
            saver.save(*run, meta(3))
    assert catalog.newest(tmp_path) == catalog.folder_of(tmp_path, 1)


def test_a_save_is_due_after_the_interval_on_rank_0_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, now = made(1), [100.0]
    monkeypatch.setattr(checkpoint_saver.time, "monotonic", lambda: now[0])
    with Saver(tmp_path, run[1], Ranks(), keep=9, every_minutes=5) as saver:
        now[0] += 299
        assert not saver.due()
        now[0] += 1
        assert saver.due()
        saver.save(*run, meta(1))
        saver.finish()
        now[0] += 299
        assert not saver.due()
    for ranks, minutes in ((Ranks(), 0.0), (Ranks(1, 1), 1e-9)):
        with Saver(tmp_path, run[1], ranks, keep=9, every_minutes=minutes) as saver:
            assert not saver.due()


def test_no_save_is_due_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, release = made(1), threading.Event()
    monkeypatch.setattr(checkpoint_saver.checkpoint_state, "write", lambda *_: release.wait(10))
    with Saver(tmp_path, run[1], Ranks(), keep=9, every_minutes=1e-9) as saver:
        saver.save(*run, meta(1))
        assert not saver.due()
        release.set()
        saver.finish()
        assert saver.due()


def test_a_save_is_due_on_a_rank_that_failed_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch_files, "save_distributed", full)
    saver = Saver(tmp_path, run[1], Ranks(), keep=9)
    saver.save(*run, meta(1))
    assert saver._writing is not None
    assert isinstance(saver._writing.exception(10), CheckpointError)
    assert saver.due()
    saver.close()


def test_only_the_newest_keep_checkpoints_are_kept(tmp_path: Path) -> None:
    run = made(1)
    with Saver(tmp_path, run[1], Ranks(), keep=2) as saver:
        for number in range(5):
            saver.save(*run, meta(number))
    assert [path.name for path in catalog.list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
