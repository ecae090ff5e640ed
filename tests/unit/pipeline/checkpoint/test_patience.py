"""A store that is away for a while delays what depends on it, and every rank decides alike when that is too long."""

import errno
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.checkpoint import catalog, patience
from pipeline.checkpoint import saver as checkpoint_saver
from pipeline.checkpoint.patience import patiently
from pipeline.checkpoint.saver import Saver
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks, on_first
from pipeline.errors import CheckpointError, Postponed
from pipeline.training.loop import run
from shards.store import storage
from shards.store.retry import StoreError
from tests.support.checkpoints import meta, small
from tests.support.ranks import run_ranks
from tests.support.runs import assert_same, start, weights

Warnings = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "AGAIN_S", 0.0)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Warnings:
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name.startswith("pipeline")
    ]


class Store:
    """Store that takes no file whose name ends with `refused` while it is away, for `failures` attempts."""

    def __init__(self, patch: pytest.MonkeyPatch, refused: str, failures: int, error: OSError | None = None) -> None:
        self.refused, self.failures = refused, failures
        self._error = error or StoreError("no good answer in 8 attempts")
        self._write = storage.write
        patch.setattr(storage, "write", self.write)

    def write(self, url: str, content: bytes) -> None:
        if self.failures and url.endswith(self.refused):
            self.failures -= 1
            raise self._error
        self._write(url, content)


def step(run: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    run[0](torch.ones(3, 4)).sum().backward()
    run[1].step()


def test_a_save_that_a_store_does_not_take_is_replaced_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Warnings
) -> None:
    run = small(1)
    with Saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        saver.save(*run, meta(1))
        saver.finish()
        store = Store(monkeypatch, "meta.json", 2)
        for number in (2, 3, 4):
            saver.save(*run, meta(number))
            step(run)
    assert store.failures == 0
    assert [path.name[-1] for path in catalog.list_checkpoints(tmp_path)] == ["1", "4"]
    first, last = warnings()
    assert first.endswith("training continues and saves again, for at most 30 minutes")
    assert "step-00000002 is not saved (no good answer" in first
    assert last.startswith("the store answers again, after ")


def test_the_last_state_is_written_again_until_the_store_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Warnings
) -> None:
    run = small(1)
    Store(monkeypatch, "meta.json", 3)
    with Saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        saver.save(*run, meta(1))
    assert catalog.newest(tmp_path) == catalog.folder_of(tmp_path, 1)
    assert len(warnings()) == 2, "one for the outage and one for its end"


def test_a_save_is_due_a_minute_after_one_that_the_store_did_not_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = small(1), [100.0]
    monkeypatch.setattr(checkpoint_saver.time, "monotonic", lambda: now[0])
    Store(monkeypatch, "meta.json", 1)
    with Saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        saver.save(*run, meta(1))
        assert saver._writing is not None
        assert saver._writing.result(10) is False
        now[0] += 59
        assert not saver.due()
        now[0] += 1
        assert saver.due()
        saver.save(*run, meta(2))
        saver.finish()
        now[0] += 1000
        assert not saver.due()


def test_a_store_that_stays_away_ends_the_run_but_not_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(1)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    monkeypatch.setattr(patience, "AGAIN_S", 0.02)
    Store(monkeypatch, "meta.json", 10**6)
    with Saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        saver.save(*run, meta(1))
        with pytest.raises(Postponed, match=r"has not answered for .*no good answer.*give the same command again"):
            saver.finish()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), PermissionError(errno.EACCES, "denied")])
def test_a_full_disk_and_denied_access_end_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    run = small(1)
    Store(monkeypatch, "meta.json", 1, error)
    with Saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        saver.save(*run, meta(1))
        with pytest.raises(CheckpointError, match="earlier checkpoints are intact"):
            saver.finish()


def test_a_network_file_system_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small(1)
    Store(monkeypatch, "meta.json", 2, OSError(errno.ESTALE, "Stale file handle"))
    with Saver(tmp_path, run[1], Ranks(), keep=9) as saver:
        saver.save(*run, meta(1))
    assert catalog.newest(tmp_path) == catalog.folder_of(tmp_path, 1)


@pytest.mark.parametrize("refused", ["meta.json", "evaluation.json", "saved"])
def test_a_run_through_an_outage_has_the_weights_of_an_undisturbed_one(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str, warnings: Warnings
) -> None:
    config = replace(tiny_config, checkpoint=replace(tiny_config.checkpoint, every_steps=1))
    run(config, start(config, tmp_path / "plain"), Ranks(), None)
    info = start(config, tmp_path / "disturbed")
    store = Store(monkeypatch, refused, 3)
    run(config, info, Ranks(), None)
    assert store.failures == 0
    assert_same(weights(config, tmp_path / "plain"), weights(config, tmp_path / "disturbed"))
    assert catalog.best(tmp_path / "disturbed") is not None
    assert len(warnings()) == 2, "one for the outage and one for its end"


def test_a_run_that_cannot_read_the_store_at_its_start_waits(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: Warnings
) -> None:
    config = replace(tiny_config, optim=replace(tiny_config.optim, max_steps=1))
    info = start(config, tmp_path)
    run(config, info, Ranks(), None)
    longer = replace(config, optim=replace(config.optim, max_steps=2))
    read, away = storage.read, ["meta.json", "saved"]

    def busy(url: str) -> bytes:
        if url.endswith(tuple(away)):
            away.remove(url.rpartition("/")[2])
            raise StoreError("no good answer in 8 attempts")
        return read(url)

    monkeypatch.setattr(storage, "read", busy)
    run(longer, info, Ranks(), None)
    assert away == []
    assert catalog.newest(tmp_path) == catalog.folder_of(tmp_path, 2)


def decide(ranks: Ranks) -> list[str]:
    """Wait for a store that answers rank 0 the third time, and then for one that never does."""
    patience.AGAIN_S, patience.PATIENCE_S = 0.01, 0.1 if ranks.first else 0.0
    tries: list[int] = []

    def act() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise StoreError("away")
        return len(tries)

    def never() -> None:
        raise StoreError("away")

    found = [str(patiently(ranks, lambda: on_first(ranks, act)))]
    try:
        patiently(ranks, lambda: on_first(ranks, never))
    except Postponed as error:
        found.append(type(error).__name__)
    return found


def test_rank_0_decides_how_long_all_ranks_wait() -> None:
    assert run_ranks(2, decide) == [["3", "Postponed"]] * 2
