"""What the server has not taken is kept beside the run, and the next spool starts from it on any node."""

import logging
import threading
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

import pytest
from PIL import Image

from pipeline.tracking import spool, unsent
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.spool_folder import SpoolFolder
from pipeline.tracking.unsent import UnsentObject
from shards.store import storage
from tests.support.tracking_server import FullDisk, Server, wait_for


class Run:
    """Run whose rank 0 may be on several nodes, each with a scratch folder, and which has one store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.object = folder, UnsentObject(str(folder / "store" / "unsent.zip"))
        self.opened: list[SpoolTracker] = []

    def start(self, node: str, server: Server) -> SpoolTracker:
        """Return the tracker of a new attempt on a node; the one before it ends as by a kill."""
        self.kill()
        self.opened.append(SpoolTracker(self.folder / node, server, self.object, interval_s=0.01))
        return self.opened[-1]

    def kill(self) -> None:
        """End the last attempt without a call of its `close`."""
        for tracker in self.opened:
            tracker._stop.set()
            tracker._thread.join()
            tracker._file.close()

    def unsent(self) -> int:
        """Return the number of kept events, and 0 if nothing is there."""
        kept = self.object.read()
        return kept.lines.count(b"\n") if kept else 0


@pytest.fixture
def a_run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path)
    yield made
    made.kill()


def report(tracker: SpoolTracker, steps: Mapping[int, float] | range) -> None:
    for step in steps:
        tracker.metrics({"train/loss": steps[step] if isinstance(steps, Mapping) else float(step)}, step)


def test_nothing_is_written_while_the_server_takes_everything(a_run: Run) -> None:
    tracker = a_run.start("a", Server())
    tracker.keep_unsent()
    report(tracker, range(3))
    tracker.close()
    assert not a_run.object.exists()


def test_another_node_starts_from_what_was_kept(a_run: Run) -> None:
    tracker = a_run.start("a", Server(up=False))
    report(tracker, range(3))
    tracker.picture("detections/0", Image.new("RGB", (4, 4), "red"), 2)
    tracker.keep_unsent()
    report(tracker, {3: 3.0})  # computed again
    server = Server()
    tracker = a_run.start("b", server)
    report(tracker, {2: 0.5, 3: 0.5})  # 2 is in what was kept
    tracker.close()
    assert server.points() == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 0.5)]
    (picture,) = [event for event in server.taken if event.kind == "picture"]
    with Image.open(a_run.folder / "b" / picture.tags["file"]) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)
    assert not a_run.object.exists()


def test_files_are_read_and_written_once_unless_another_node_takes_over(
    a_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[tuple[str, str]] = []
    for name in ("read", "write"):
        call = getattr(storage, name)

        def counted(url: str, *given: object, name: str = name, call: object = call) -> object:
            requests.append((name, Path(url).suffix))
            return call(url, *given)  # type: ignore[operator]

        monkeypatch.setattr(storage, name, counted)

    def keep(node: str) -> list[str]:
        tracker = a_run.start(node, Server(up=False))
        report(tracker, range(1))
        tracker.picture(f"detections/{node}", Image.new("RGB", (4, 4), "red"), 2)
        tracker.close()
        a_run.object = UnsentObject(a_run.object.url)  # as in a new process
        return [name for name, suffix in requests if suffix == ".png"]

    assert keep("a") == ["write"]
    assert keep("a") == ["write"]
    assert keep("b").count("read") == 1
    assert a_run.object.kept_by() == SpoolFolder(a_run.folder / "b").id


def test_on_the_same_node_the_spool_itself_continues(a_run: Run) -> None:
    tracker = a_run.start("a", Server(up=False))
    report(tracker, range(3))
    tracker.keep_unsent()
    report(tracker, {3: 3.0})
    server = Server()
    tracker = a_run.start("a", server)
    report(tracker, {3: 0.5})
    tracker.close()
    assert server.points() == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_node_that_was_left_does_not_continue_its_own_spool(a_run: Run) -> None:
    report(a_run.start("a", Server(up=False)), range(2))
    a_run.opened[-1].keep_unsent()
    tracker = a_run.start("b", Server(up=False))
    report(tracker, {2: 2.0})
    tracker.keep_unsent()
    server = Server()
    a_run.start("a", server).close()
    assert server.points() == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_node_that_takes_over_says_so_at_once(a_run: Run) -> None:
    tracker = a_run.start("a", Server(up=False))
    report(tracker, range(2))
    tracker.keep_unsent()
    report(tracker, {2: 2.0})
    a_run.start("b", Server(up=False))
    server = Server()
    a_run.start("a", server).close()
    assert server.points() == [(0, 0.0), (1, 1.0)], "step 2 of a was computed again by b"


def test_what_a_power_loss_took_from_the_spool_is_read_from_beside_the_run(a_run: Run) -> None:
    tracker = a_run.start("a", Server(up=False))
    report(tracker, range(4))
    tracker.keep_unsent()
    a_run.kill()
    events = a_run.folder / "a" / "events.jsonl"
    events.write_bytes(b"".join(events.read_bytes().splitlines(keepends=True)[:2]))
    server = Server()
    a_run.start("a", server).close()
    assert server.points() == [(step, float(step)) for step in range(4)]


def test_only_what_is_unsent_is_read_and_written(a_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    tracker = a_run.start("a", server)
    report(tracker, range(100))
    wait_for(lambda: tracker.empty)
    server.up = False
    report(tracker, range(100, 103))
    reads: list[int] = []
    read = SpoolFolder.read

    def counted(self: SpoolFolder, start: int = 0, end: int | None = None) -> bytes:
        found = read(self, start, end)
        reads.append(found.count(b"\n"))
        return found

    monkeypatch.setattr(SpoolFolder, "read", counted)
    tracker.keep_unsent()
    tracker.keep_unsent()  # nothing new
    assert (reads, a_run.unsent()) == ([3], 3)


def test_events_that_wait_in_memory_for_a_full_disk_are_kept(a_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = a_run.start("a", Server(up=False))
    monkeypatch.setattr(tracker, "_file", FullDisk(tracker._file, free=100))
    report(tracker, range(4))
    tracker.keep_unsent()
    server = Server()
    a_run.start("a", server).close()
    assert server.points() == [(step, float(step)) for step in range(4)]


def test_reports_do_not_wait_for_the_store(a_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = a_run.start("a", Server(up=False))
    report(tracker, range(2))
    entered, answer, write = threading.Event(), threading.Event(), storage.write

    def slow(url: str, content: bytes) -> None:
        entered.set()
        assert answer.wait(60)
        write(url, content)

    monkeypatch.setattr(storage, "write", slow)
    saver = threading.Thread(target=tracker.keep_unsent)
    saver.start()
    assert entered.wait(60)
    report(tracker, range(2, 5))  # would never return if it waited
    answer.set()
    saver.join()
    assert a_run.unsent() == 2


def test_an_error_of_the_store_is_raised_and_the_next_call_tries_again(
    a_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OSError("away")

    tracker = a_run.start("a", Server(up=False))
    report(tracker, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", away)
        with pytest.raises(OSError, match="away"):
            tracker.keep_unsent()
    tracker.keep_unsent()
    assert a_run.unsent() == 2


def test_closing_without_the_store_only_warns(
    a_run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: object) -> None:
        raise OSError("the store is away")

    tracker = a_run.start("a", Server(up=False))
    report(tracker, range(2))
    monkeypatch.setattr(storage, "write", away)
    with caplog.at_level(logging.WARNING, spool.LOG.name):
        tracker.close()
    assert "is on this node alone (the store is away)" in caplog.text


def test_a_damaged_object_is_removed_and_stops_nothing(a_run: Run, caplog: pytest.LogCaptureFixture) -> None:
    storage.write(a_run.object.url, b"no zip file")
    server = Server()
    with caplog.at_level(logging.WARNING, unsent.LOG.name):
        tracker = a_run.start("a", server)
    report(tracker, range(2))
    tracker.close()
    assert "is damaged and removed" in caplog.text
    assert (server.points(), a_run.object.exists()) == ([(0, 0.0), (1, 1.0)], False)


def test_a_picture_is_never_written_outside_the_spool(a_run: Run) -> None:
    report(a_run.start("a", Server(up=False)), range(1))
    a_run.opened[-1].keep_unsent()
    with zipfile.ZipFile(a_run.object.url, "a") as archive:
        archive.writestr("../outside.png", b"x")
        archive.writestr("/outside.png", b"x")
    kept = a_run.object.read()
    assert kept is not None
    assert not kept.pictures


def test_a_long_outage_writes_each_picture_once_and_leaves_nothing(a_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = storage.write

    def counted(url: str, content: bytes) -> None:
        written.append(PurePath(url).name)
        write(url, content)

    monkeypatch.setattr(storage, "write", counted)
    server = Server(up=False)
    tracker = a_run.start("a", server)
    for step in range(3):
        tracker.picture("detections/0", Image.new("RGB", (4, 4), "red"), step)
        tracker.keep_unsent()
    spool_id = SpoolFolder(a_run.folder / "a").id
    pictures = [f"{spool_id}-detections-0-{step:08d}.png" for step in range(3)]
    assert [name for name in written if name.endswith(".png")] == pictures
    assert written.count("unsent.zip") == 3
    tracker = a_run.start("a", server)  # a restart on the node knows what is there
    report(tracker, range(1))
    tracker.keep_unsent()
    assert [name for name in written if name.endswith(".png")] == pictures
    kept = a_run.object.read()
    assert kept is not None
    assert len(kept.pictures) == 3
    a_run.start("b", Server(up=False))
    other_id = SpoolFolder(a_run.folder / "b").id
    files = a_run.folder / "store" / "unsent-files" / "unsent"
    assert {path.name.split("-")[0] for path in files.iterdir()} == {
        other_id
    }  # those of the node that was left are gone
    a_run.start("b", Server()).close()
    assert list((a_run.folder / "store").iterdir()) == []
