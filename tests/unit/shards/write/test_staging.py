"""Staging of data sets in folders, and of their files."""

from contextlib import suppress
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.store import storage
from shards.write.staging import Stage


@pytest.mark.parametrize("module", ["socket.gethostname", "os.getpid"])
def test_two_attempts_at_a_shard_write_separate_files(tmp_path, monkeypatch, module):
    """Ray may retry a shard on another node or in another process while the first attempt is still running."""
    stage = Stage(str(tmp_path), "key")
    with stage.draft("a.tar") as first:
        first.file.write(b"first, ")
        monkeypatch.setattr(f"shards.write.staging.{module}", lambda: 4242)
        with stage.draft("a.tar") as second:
            second.file.write(b"second")
            second.finished = True
        first.file.write(b"and longer")
        first.finished = True
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.tar", b"first, and longer")]


def test_a_file_that_was_not_finished_does_not_appear(tmp_path):
    stage = Stage(str(tmp_path), "key")
    with stage.draft("a.tar") as draft:
        draft.file.write(b"half")
    with suppress(RuntimeError), stage.draft("b.tar") as draft:
        draft.finished = True
        raise RuntimeError
    with stage.draft("c.tar") as draft:
        draft.file.write(b"whole")
        draft.finished = True
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("c.tar", b"whole")]


def test_user_folder_is_not_mistaken_for_leftovers(coco):
    theirs = coco.root / "out.partial"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("dear")
    with pytest.raises(
        ShardError, match=r"out\.partial: is not empty .* move it away or choose another --out"
    ) as caught:
        coco.write()
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_text() for path in theirs.iterdir()} == {"thesis.txt": "dear"}


def test_leftovers_of_a_run_killed_at_its_start_are_reused(coco):
    notes = coco.root / "out.partial" / ".partial"
    notes.mkdir(parents=True)
    (notes / ".key.4242").write_text("half a k")
    manifest = coco.write()
    assert sorted(storage.listing(manifest.url)) == sorted(
        ["manifest.json", "report.json", *(file.name for file in (*manifest.files, *manifest.shards))]
    )


def test_run_killed_while_publishing_can_be_repeated(coco, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "sync_folder", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            coco.write()
    assert (coco.root / "out.partial").exists()
    assert coco.write().images == 7


def test_every_folder_is_on_the_disk_before_a_data_set_appears(coco, monkeypatch):
    synced = []
    sync, rename = storage.sync_folder, Path.rename

    def syncing(path):
        synced.append(str(path.relative_to(coco.root)))
        sync(path)

    def renaming(path, target):
        if path.is_dir():
            synced.append("renamed")
        return rename(path, target)

    monkeypatch.setattr(storage, "sync_folder", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    coco.write()
    assert synced[-4:] == ["out.partial/index", "out.partial", "renamed", "."]
