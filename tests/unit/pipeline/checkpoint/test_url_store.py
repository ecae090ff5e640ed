"""Checkpoints in a store behind a URL are as atomic as those in a folder."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Url
from pipeline.checkpoint.metadata import Best, read_meta
from pipeline.checkpoint.pruning import prune
from pipeline.checkpoint.saver import Saver
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from pipeline.training.loop import run
from pipeline.training.state import RunInfo
from shards.errors import ShardError
from shards.store import storage
from shards.store.retry import StoreError
from tests.support.checkpoints import assert_same_state, save_small, small
from tests.support.ranks import run_ranks
from tests.support.runs import Kill, KillingTracker, start
from tests.support.tracker import MemoryTracker


@pytest.fixture
def root() -> Iterator[Url]:
    yield Url("memory://bucket/runs/tiny-1")
    fsspec.filesystem("memory").store.clear()


def files(root: Url) -> list[str]:
    """Names below the run's checkpoints, with each state folder's random name as `*`."""
    found = []
    for name in storage.listing(str(root / "checkpoints")):
        step, *rest = name.split("/")
        found.append("/".join([step[-1], *(["*", rest[1]] if len(rest) == 2 else rest)]))
    return sorted(found)


def test_saved_state_is_loaded_and_metadata_is_written_last(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = storage.write
    monkeypatch.setattr(storage, "write", lambda url, content: (written.append(url), write(url, content)))
    path = save_small(root, 3, seed=1)
    assert str(path) == "memory://bucket/runs/tiny-1/checkpoints/step-00000003"
    assert written[-1] == f"{path}/meta.json"
    assert files(root) == ["3/*/.metadata", "3/*/__0_0.distcp", "3/meta.json"]
    other = small(2)
    checkpoint_state.load(path, *other, Ranks())
    assert_same_state(other, small(1))
    model, _ = small(2)
    checkpoint_state.load_weights(path, model)
    assert torch.equal(model.state_dict()["0.weight"], small(1)[0].state_dict()["0.weight"])


def test_metrics_best_and_pruning_work_as_in_a_folder(root: Url) -> None:
    for step, ap in ((1, 0.1), (2, 0.4), (3, 0.4), (4, 0.3)):
        catalog.write_evaluation(save_small(root, step), {"AP": ap})
    path = save_small(root, 5)
    assert catalog.read_evaluation(path) is None
    assert read_meta(path).best == Best(3, 0.4)
    found = catalog.best(root)
    assert found is not None
    assert (found[0].name, found[1]) == ("step-00000003", {"AP": 0.4})
    prune(catalog.Shelf(root).look(), keep=1)
    assert [path.name[-1] for path in catalog.list_checkpoints(root)] == ["3", "5"]
    assert {name[0] for name in files(root)} == {"3", "5"}


def test_checkpoints_without_metadata_are_ignored_and_pruned(root: Url) -> None:
    save_small(root, 1)
    storage.remove(str(save_small(root, 2) / "meta.json"))
    storage.write(str(root / "checkpoints" / "step-00000003" / "0123" / "__0_0.distcp"), b"half")
    assert catalog.newest(root) == catalog.folder_of(root, 1)
    prune(catalog.Shelf(root).look(), keep=9)
    assert files(root) == ["1/*/.metadata", "1/*/__0_0.distcp", "1/meta.json"]


def test_a_killed_attempt_keeps_the_earlier_checkpoint_and_is_removed(
    root: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even for the same step: the earlier checkpoint counts until the new `meta.json` replaces its own."""
    path = save_small(root, 3, seed=1)
    write = storage.write

    def killed(url: str, content: bytes) -> None:
        if url.endswith("meta.json"):
            raise Kill
        write(url, content)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", killed)
        with pytest.raises(Kill):
            save_small(root, 3, seed=2)
    assert len(files(root)) == 5
    loaded = small(9)
    checkpoint_state.load(path, *loaded, Ranks())
    assert_same_state(loaded, small(1))
    prune(catalog.Shelf(root).look(), keep=9)
    assert len(files(root)) == 3
    checkpoint_state.load(path, *loaded, Ranks())
    assert_same_state(loaded, small(1))
    save_small(root, 3, seed=5)
    prune(catalog.Shelf(root).look(), keep=9)
    assert len(files(root)) == 3
    checkpoint_state.load(path, *loaded, Ranks())
    assert_same_state(loaded, small(5))


def test_deleting_removes_the_metadata_first(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_small(root, step)
    removed: list[str] = []
    remove = storage.remove
    monkeypatch.setattr(storage, "remove", lambda url: (removed.append(url), remove(url)))
    prune(catalog.Shelf(root).look(), keep=1)
    assert removed[0].endswith("step-00000001/meta.json")
    assert len(removed) == 3


def test_pruning_outlives_an_outage(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    save_small(root, 1)
    save_small(root, 2)

    def fail(url: str) -> dict[str, int]:
        raise StoreError(f"{url}: no good answer")

    with Saver(root, small(0)[1], Ranks(), keep=1) as saver:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "listing", fail)
            saver.prune()
        saver.prune()
    assert catalog.list_checkpoints(root) == [catalog.folder_of(root, 2)]


def test_a_damaged_checkpoint_in_a_store_is_one_clear_error(root: Url) -> None:
    path = save_small(root, 3)
    with pytest.raises(CheckpointError, match=r"step-00000009/meta\.json cannot be read"):
        checkpoint_state.load_weights(catalog.folder_of(root, 9), small(0)[0])
    data = next(name for name in storage.listing(str(path)) if name.endswith(".distcp"))
    storage.write(str(path / data), storage.read(str(path / data))[:900])
    with pytest.raises(CheckpointError, match="does not fit this model or is damaged"):
        checkpoint_state.load(path, *small(0), Ranks())


@pytest.mark.parametrize("name", [".metadata", "meta.json"])
def test_an_outage_while_a_description_is_read_may_pass(root: Url, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path, read = save_small(root, 3), storage.read

    def fail(url: str) -> bytes:
        if url.endswith(name):
            raise StoreError(f"{url}: no good answer")
        return read(url)

    monkeypatch.setattr(storage, "read", fail)
    with pytest.raises(StoreError, match=f"{name}: no good answer"):
        checkpoint_state.load(path, *small(0), Ranks())


def load_sharded(ranks: Ranks, folder: str, away: int) -> tuple[int, str]:
    """Load slices while the metadata is away from rank `away`; return the reads of `meta.json` and the error."""
    names, read = list[str](), storage.read
    root = Url(f"file://{folder}")

    def counted(url: str) -> bytes:
        names.append(url.rpartition("/")[2])
        if url.endswith(".metadata") and ranks.rank == away:
            raise StoreError("no good answer")
        return read(url)

    storage.read = counted
    try:
        model, optimizer = small(0)
        state = checkpoint_state.state_of(model, optimizer)
        checkpoint_state._read(catalog.folder_of(root, 3), state, ranks)
    except Exception as error:
        return names.count("meta.json"), type(error).__name__
    finally:
        storage.read = read
    return names.count("meta.json"), ""


@pytest.mark.parametrize(("away", "error"), [(-1, ""), (1, "StoreError")])
def test_ranks_that_read_slices_ask_for_the_description_once(tmp_path: Path, away: int, error: str) -> None:
    save_small(Url(f"file://{tmp_path}"), 3)
    assert run_ranks(2, load_sharded, str(tmp_path), away) == [(1, error), (0, error)]


def test_a_refused_write_is_one_line_and_keeps_earlier_checkpoints(root: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    save_small(root, 1)

    def refuse(url: str, *_: object) -> None:
        raise ShardError(f"{url}: access denied")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", refuse)
        with pytest.raises(
            CheckpointError, match=r"could not be written .*access denied.*earlier checkpoints"
        ) as caught:
            save_small(root, 2)
    assert "\n" not in str(caught.value)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_range", refuse)
        with pytest.raises(CheckpointError, match=r"step-00000001 cannot be read .*access denied"):
            checkpoint_state.load(catalog.folder_of(root, 1), *small(0), Ranks())
    assert catalog.newest(root) == catalog.folder_of(root, 1)


def test_a_killed_run_continues_from_the_store(tiny_config: RunConfig, root: Url, tmp_path: Path) -> None:
    config = replace(
        tiny_config, checkpoint=replace(tiny_config.checkpoint, every_steps=2, store="memory://bucket/runs")
    )
    run_info: RunInfo = start(config, tmp_path / "tiny-1")
    with pytest.raises(Kill):
        run(config, run_info, Ranks(), KillingTracker("train", 4))
    assert not (run_info.folder / "checkpoints").exists()
    tracker = MemoryTracker()
    run(config, run_info, Ranks(), tracker)
    assert [step for name, _, step in tracker.points if name == "train/loss"] == [4, 5, 6]
    assert tracker.checkpoints[-1] == (f"{root}/checkpoints/step-00000006", 6)
    found = catalog.best(root)
    assert found is not None
    plain = start(tiny_config, tmp_path / "plain")
    run(tiny_config, plain, Ranks(), None)
    other = catalog.read_evaluation(catalog.folder_of(plain.folder, 6))
    assert catalog.read_evaluation(catalog.folder_of(root, 6)) == other is not None
