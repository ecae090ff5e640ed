"""The newest and the best checkpoint, pruning, and a run whose checkpoints are not found."""

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.checkpoint import catalog, pruning
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.pruning import prune
from pipeline.config import RunConfig
from pipeline.distributed.ranks import Ranks
from pipeline.errors import CheckpointError
from pipeline.training.loop import run
from shards.store import storage
from tests.support.checkpoints import meta, save_checkpoint, save_small, small
from tests.support.runs import Kill, KillingTracker, start
from tests.support.tracker import MemoryTracker


def test_the_newest_is_the_complete_checkpoint_of_the_highest_step(tmp_path: Path) -> None:
    assert catalog.newest(tmp_path) is None
    for step in (900, 1000, 200):
        save_small(tmp_path, step)
    save_small(tmp_path, 5000).rename(tmp_path / "checkpoints" / "step-00005000.partial")
    save_small(tmp_path, 6000).joinpath("meta.json").unlink()
    assert [path.name for path in catalog.list_checkpoints(tmp_path)] == [
        "step-00000200",
        "step-00000900",
        "step-00001000",
    ]
    assert catalog.newest(tmp_path) == catalog.folder_of(tmp_path, 1000)


def test_metrics_are_written_beside_the_checkpoint(tmp_path: Path) -> None:
    path = save_small(tmp_path, 3)
    assert catalog.read_evaluation(path) is None
    catalog.write_evaluation(path, {"AP": 0.25, "APs": -1.0})
    assert catalog.read_evaluation(path) == {"AP": 0.25, "APs": -1.0}
    assert not list(path.glob("*.partial"))


def test_the_best_is_the_newest_with_the_highest_ap(tmp_path: Path) -> None:
    assert catalog.best(tmp_path) is None
    for step, ap in ((1, 0.1), (2, 0.4), (3, 0.4), (4, 0.3)):
        catalog.write_evaluation(save_small(tmp_path, step), {"AP": ap})
    save_small(tmp_path, 5)  # not evaluated
    found = catalog.best(tmp_path)
    assert found is not None
    assert (found[0].name, found[1]["AP"]) == ("step-00000003", 0.4)


def test_with_masks_the_best_has_the_highest_mask_ap(tmp_path: Path) -> None:
    for step, ap, mask_ap in ((1, 0.4, 0.1), (2, 0.3, 0.2), (3, 0.5, 0.0)):
        catalog.write_evaluation(save_small(tmp_path, step), {"AP": ap, "mask_AP": mask_ap})
    found = catalog.best(tmp_path)
    assert found is not None
    assert found[0].name == "step-00000002"


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        path = save_small(tmp_path, step)
        if step in (2, 4):
            catalog.write_evaluation(path, {"AP": 1 / step})
    prune(catalog.Shelf(tmp_path).look(), keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000002",
        "step-00000005",
        "step-00000006",
    ]
    prune(catalog.Shelf(tmp_path).look(), keep=2)
    assert len(catalog.list_checkpoints(tmp_path)) == 3


def test_pruning_keeps_milestones(tmp_path: Path) -> None:
    for step in range(1, 6):
        milestone = meta(step, milestone=step in (1, 3))
        save_checkpoint(tmp_path, *small(0), milestone, Ranks())
        prune(catalog.Shelf(tmp_path).look(), keep=1)
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
        prune(catalog.Shelf(tmp_path).look(), keep=2)
    assert len(catalog.list_checkpoints(tmp_path)) == 5
    assert "Too many open files" in caplog.text
    caplog.clear()
    discard = pruning.delete

    def held(path: Path) -> None:
        if path.name.endswith("3"):
            raise PermissionError(13, "Permission denied")
        discard(path)

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "delete", held)
        prune(catalog.Shelf(tmp_path).look(), keep=1)
    assert [path.name[-1] for path in catalog.list_checkpoints(tmp_path)] == ["1", "2", "3", "5"], "others are deleted"
    assert "failed 1 times" in caplog.text
    prune(catalog.Shelf(tmp_path).look(), keep=1)
    assert [path.name[-1] for path in catalog.list_checkpoints(tmp_path)] == ["1", "2", "5"]


def test_too_many_checkpoints_do_not_wait_for_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The oldest, which may be under evaluation at the time, and the newest stay."""
    monkeypatch.setattr(pruning, "MOST_WAITING", 3)
    for step in range(1, 8):
        milestone = step == 2
        save_checkpoint(tmp_path, *small(0), meta(step, evaluate=True, milestone=milestone), Ranks())
        prune(catalog.Shelf(tmp_path).look(), keep=1)
    assert [path.name[-1] for path in catalog.list_checkpoints(tmp_path)] == ["1", "2", "5", "6", "7"]
    assert "4 checkpoints wait for their evaluation" in caplog.text
    assert "deleted without one: step-00000003" in caplog.text


def test_a_look_is_one_listing_and_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in range(1, 9):
        path = save_checkpoint(tmp_path, *small(0), meta(step, evaluate=step > 4), Ranks())
        if step <= 4:
            catalog.write_evaluation(path, {"AP": 0.1 * step})
    requests: list[str] = []
    read = storage.read
    monkeypatch.setattr(storage, "read", lambda url: (requests.append(url), read(url))[1])
    shelf = catalog.Shelf(tmp_path).look()
    for _ in range(2):
        prune(shelf.look(), keep=1)
        assert shelf.best() == (catalog.folder_of(tmp_path, 4), {"AP": 0.4})
        assert [path.name[-1] for path in shelf.pending()] == ["5", "6", "7", "8"]
    assert len(requests) == len(set(requests)) == 11, "the metrics of 4, and the metadata of all but the best"
    catalog.write_evaluation(catalog.folder_of(tmp_path, 6), {"AP": 0.9})
    found = shelf.look().best()
    assert found is not None
    assert found[0].name[-1] == "6"


def test_a_checkpoint_that_is_not_shown_yet_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(catalog, "_LOOK_S", 0.0)
    for step in (1, 2):
        save_small(tmp_path, step)
    catalog.note_saved(tmp_path, 2)
    newest, hidden = catalog.newest, [True, True]

    def stale(root: Path) -> Location | None:
        return catalog.folder_of(root, 1) if hidden and hidden.pop() else newest(root)

    monkeypatch.setattr(catalog, "newest", stale)
    found = catalog.newest_with_meta(tmp_path, tmp_path, stale_s=60)
    assert found is not None
    assert (found[0].name, found[1].step) == ("step-00000002", 2)
    hidden.append(True)
    older = catalog.newest_with_meta(tmp_path, tmp_path)
    assert older is not None
    assert older[1].step == 1, "after the wait, what is shown is what there is"
    assert "does not hold step 2, which the run has saved" in caplog.text


def test_another_run_s_checkpoints_are_not_continued(tmp_path: Path) -> None:
    root, folder = tmp_path / "store" / "it", tmp_path / "it"
    path = save_small(root, 1)
    catalog.note_saved(folder, 1)
    assert catalog.newest_of_run(root, folder, run_id="r") == path
    with pytest.raises(
        CheckpointError, match=r"step-00000001 is of run r; expected checkpoints of run other"
    ) as caught:
        catalog.newest_of_run(root, folder, run_id="other")
    assert "\n" not in str(caught.value)
    catalog.note_saved(folder, 2)  # not shown
    with pytest.raises(CheckpointError, match="is of run r"):
        catalog.newest_with_meta(root, folder, run_id="other")


def test_pruning_removes_the_remains_of_kills(tmp_path: Path) -> None:
    save_small(tmp_path, 1).rename(tmp_path / "checkpoints" / "step-00000001.deleted.partial")
    save_small(tmp_path, 5).rename(tmp_path / "checkpoints" / "step-00000005.partial")
    save_small(tmp_path, 2)
    prune(catalog.Shelf(tmp_path).look(), keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_metrics_that_cannot_be_written_are_one_clear_error(tmp_path: Path) -> None:
    path = save_small(tmp_path, 3)
    (path / "evaluation.json").mkdir()
    with pytest.raises(CheckpointError, match=r"evaluation\.json could not be written .*checkpoint itself is intact"):
        catalog.write_evaluation(path, {"AP": 0.1})


def stored(config: RunConfig, store: Path) -> RunConfig:
    return replace(config, checkpoint=replace(config.checkpoint, every_steps=2, store=str(store)))


def losses(tracker: MemoryTracker) -> list[int]:
    return [step for name, _, step in tracker.points if name == "train/loss"]


def test_workers_without_the_store_refuse_to_start_again(
    tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalog, "STALE_S", 0.0)
    store, away = tmp_path / "store", tmp_path / "away"
    config, run_info = stored(tiny_config, store), start(tiny_config, tmp_path / "tiny-1")
    with pytest.raises(Kill):
        run(config, run_info, Ranks(), KillingTracker("train", 4))
    store.rename(away)
    tracker = MemoryTracker()
    with pytest.raises(
        CheckpointError, match=r"store/tiny-1 .* has saved step 3 there: is its storage mounted"
    ) as caught:
        run(config, run_info, Ranks(), tracker)
    assert "\n" not in str(caught.value)
    assert tracker.points == []
    assert not store.exists()
    away.rename(store)
    run(config, run_info, Ranks(), tracker)
    assert losses(tracker) == [4, 5, 6]
    assert catalog.newest_of_run(store / "tiny-1", run_info.folder) == catalog.folder_of(store / "tiny-1", 6)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tiny_config: RunConfig, tmp_path: Path) -> None:
    config, run_info = stored(tiny_config, tmp_path / "store"), start(tiny_config, tmp_path / "tiny-1")
    with pytest.raises(Kill):
        run(config, run_info, Ranks(), KillingTracker("train", 2))
    tracker = MemoryTracker()
    run(config, run_info, Ranks(), tracker)
    assert losses(tracker) == [1, 2, 3, 4, 5, 6]
