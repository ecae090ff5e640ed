"""The spool loses no event and sends no step twice, whatever happens to the server or to the process."""

import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import pytest
from PIL import Image

from pipeline.tracking import spool
from pipeline.tracking.spool import Event, SpoolTracker


class Server:
    """Receiver that accepts events while it is up and keeps them."""

    def __init__(self, up: bool = True) -> None:
        self.up = up
        self.taken: list[Event] = []
        self.calls = threading.Semaphore(0)

    def __call__(self, events: Sequence[Event]) -> None:
        self.calls.release()
        if not self.up:
            raise ConnectionError("down")
        self.taken += events

    def points(self, name: str = "train/loss") -> list[tuple[int, float]]:
        return [(event.step, event.values[name]) for event in self.taken if name in event.values]


Open = Callable[[Server], SpoolTracker]


@pytest.fixture
def open_spool(tmp_path: Path) -> Iterator[Open]:
    opened: list[SpoolTracker] = []

    def spool(server: Server) -> SpoolTracker:
        opened.append(SpoolTracker(tmp_path / "spool", server, interval_s=0.01))
        return opened[-1]

    yield spool
    for tracker in opened:
        if not tracker._file.closed:
            tracker.close()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_everything_arrives_in_order(open_spool: Open) -> None:
    server = Server()
    tracker = open_spool(server)
    tracker.tags({"detr.phase": "training"})
    tracker.metrics({"train/loss": 2.0, "optim/lr": 0.1}, 1)
    tracker.picture("detections/0", Image.new("RGB", (4, 4), "red"), 1)
    tracker.table("per_class_ap.json", {"name": ["cat"], "AP": [0.5]}, 1)
    tracker.checkpoint("/run/step-1", 1, {"val/AP": 0.5})
    tracker.metrics({"train/loss": 1.0}, 2)
    tracker.close()
    assert [event.kind for event in server.taken] == ["tags", "metrics", "picture", "table", "checkpoint", "metrics"]
    assert server.taken[1].values == {"train/loss": 2.0, "optim/lr": 0.1}
    assert server.taken[3].columns == {"name": ["cat"], "AP": [0.5]}
    assert (server.taken[4].name, server.taken[4].values) == ("/run/step-1", {"val/AP": 0.5})
    times = [event.time_ms for event in server.taken]
    assert times == sorted(times)


def test_points_arrive_while_the_tracker_is_open(open_spool: Open) -> None:
    server = Server()
    tracker = open_spool(server)
    tracker.metrics({"train/loss": 2.0}, 1)
    wait_for(lambda: server.points() == [(1, 2.0)])


def test_an_outage_delays_and_loses_nothing(open_spool: Open, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(up=False)
    tracker = open_spool(server)
    with caplog.at_level(logging.WARNING, spool.LOG.name):
        for step in range(20):
            tracker.metrics({"train/loss": float(step)}, step)
        for _ in range(3):
            assert server.calls.acquire(timeout=10)
    assert [record.message for record in caplog.records if "behind" in record.message] == [
        f"tracking is behind (down); events are kept in {tracker._path} and sent later"
    ]
    server.up = True
    wait_for(lambda: len(server.points()) == 20)
    tracker.metrics({"train/loss": 20.0}, 20)
    tracker.close()
    assert server.points() == [(step, float(step)) for step in range(21)]


def test_a_batch_that_fails_is_sent_again_completely(open_spool: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_BATCH", 4)
    server = Server(up=False)
    tracker = open_spool(server)
    for step in range(10):
        tracker.metrics({"train/loss": 1.0}, step)
    server.up = True
    tracker.close()
    assert [step for step, _ in server.points()] == list(range(10))


def test_unsent_events_are_sent_at_the_next_start(open_spool: Open, caplog: pytest.LogCaptureFixture) -> None:
    first = open_spool(Server(up=False))
    first.metrics({"train/loss": 1.0}, 1)
    with caplog.at_level(logging.WARNING, spool.LOG.name):
        first.close()
    assert "the rest is kept in" in caplog.text
    server = Server()
    second = open_spool(server)
    second.metrics({"train/loss": 2.0}, 2)
    second.close()
    assert server.points() == [(1, 1.0), (2, 2.0)]


def test_a_restart_drops_steps_that_were_reported_before(open_spool: Open) -> None:
    first_server = Server()
    first = open_spool(first_server)
    for step in (10, 20, 30):
        first.metrics({"train/loss": float(step), "optim/lr": 0.1}, step)
    first.checkpoint("/c/20", 20, {"val/AP": 0.2})
    first.picture("detections/0", Image.new("RGB", (4, 4)), 20)
    first.close()
    server = Server()
    second = open_spool(server)  # continues from the checkpoint of step 20
    second.checkpoint("/c/20", 20, {"val/AP": 0.2})
    second.picture("detections/0", Image.new("RGB", (4, 4)), 20)
    for step in (25, 30, 40):
        second.metrics({"train/loss": -1.0, "optim/lr": 0.1}, step)
    second.checkpoint("/c/40", 40, {"val/AP": 0.4})
    second.close()
    assert [(event.kind, event.step) for event in server.taken] == [("metrics", 40), ("checkpoint", 40)]


def test_each_metric_family_has_its_own_last_step(open_spool: Open) -> None:
    server = Server()
    tracker = open_spool(server)
    tracker.metrics({"train/loss": 1.0}, 30)
    tracker.metrics({"val/AP": 0.5, "train/loss": 9.0}, 20)
    tracker.close()
    assert server.points("val/AP") == [(20, 0.5)]
    assert server.points() == [(30, 1.0)]


def test_values_that_are_not_finite_are_dropped(open_spool: Open) -> None:
    server = Server()
    tracker = open_spool(server)
    tracker.metrics({"train/loss": math.nan, "train/loss_ce": 1.0}, 1)
    tracker.metrics({"train/loss": math.inf}, 2)
    tracker.close()
    assert [event.values for event in server.taken] == [{"train/loss_ce": 1.0}]


def test_with_any_order_each_step_is_sent_once_and_tables_only_advance(tmp_path: Path, open_spool: Open) -> None:
    for attempt in range(2):
        server = Server()
        tracker = SpoolTracker(tmp_path / "spool", server, any_order=True)
        for step in (200, 300, 100):
            tracker.checkpoint(f"/c/{step}", step, {"val/AP": 0.1, "evaluation/epoch": 1.0})
            tracker.table("per_class_ap.json", {"step": [step]}, step)
            tracker.picture("curves/precision_recall", Image.new("RGB", (4, 4)), step)
        tracker.close()
        sent = [(event.kind, event.step) for event in server.taken]
        tables = [event for event in sent if event[0] == "table"]
        others = [event for event in sent if event[0] != "table"]
        if attempt == 0:
            assert tables == [("table", 200), ("table", 300)]
            assert others == [(kind, step) for step in (200, 300, 100) for kind in ("checkpoint", "picture")]
        else:
            assert (tables, others) == ([("table", 300)], [])


def test_a_cursor_past_the_end_after_a_power_loss_loses_no_line(open_spool: Open, tmp_path: Path) -> None:
    tracker = open_spool(Server())
    for step in range(10):
        tracker.metrics({"train/loss": float(step)}, step)
    tracker.close()
    path = tmp_path / "spool" / "events.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))  # the cursor counts ten
    server = Server(up=False)
    tracker = open_spool(server)
    for step in range(4, 30):  # past where the cursor was
        tracker.metrics({"train/loss": float(step)}, step)
    server.up = True
    tracker.close()
    assert server.points() == [(step, float(step)) for step in range(30)]


def test_drain_sends_what_a_closed_tracker_could_not(open_spool: Open, tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    assert not spool.unsent(folder)
    assert spool.drain(folder, Server())
    tracker = open_spool(Server(up=False))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close()
    assert spool.unsent(folder)
    server = Server()
    assert spool.drain(folder, server)
    assert server.points() == [(1, 1.0)]
    assert not spool.unsent(folder)


def test_drain_keeps_events_when_the_server_is_down(
    open_spool: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_spool(Server(up=False))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close()
    caplog.clear()
    assert not spool.drain(tmp_path / "spool", Server(up=False))
    assert "did not accept all events (down)" in caplog.text
    assert spool.unsent(tmp_path / "spool")


def test_drain_ends_in_time_and_keeps_the_rest(
    open_spool: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_BATCH", 1)
    tracker = open_spool(Server(up=False))
    for step in (1, 2, 3):
        tracker.metrics({"train/loss": float(step)}, step)
    tracker.close()
    server = Server()
    assert not spool.drain(tmp_path / "spool", server, timeout_s=-1)  # over after the first batch
    assert server.points() == [(1, 1.0)]
    assert spool.drain(tmp_path / "spool", server)
    assert server.points() == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_an_empty_cursor_after_a_power_loss_sends_everything(open_spool: Open, tmp_path: Path) -> None:
    tracker = open_spool(Server(up=False))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close()
    (tmp_path / "spool" / "cursor").write_text("")
    assert spool.unsent(tmp_path / "spool")


def test_drain_removes_a_half_line_of_a_killed_writer(open_spool: Open, tmp_path: Path) -> None:
    tracker = open_spool(Server(up=False))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close()
    with (tmp_path / "spool" / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "metr')
    server = Server()
    assert spool.drain(tmp_path / "spool", server)
    assert server.points() == [(1, 1.0)]
    assert not spool.unsent(tmp_path / "spool")


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from pipeline.tracking.spool import SpoolTracker
def send(events):
    raise ConnectionError
tracker = SpoolTracker(Path(sys.argv[1]), send, interval_s=0.01)
step = 0
while True:
    step += 1
    tracker.metrics({"train/loss": float(step)}, step)
    print(step, flush=True)
"""


def test_a_killed_process_loses_only_its_half_written_line(tmp_path: Path, open_spool: Open) -> None:
    root = Path(spool.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "spool"), str(root)], stdout=subprocess.PIPE
    )
    assert process.stdout
    try:
        while int(process.stdout.readline()) < 200:
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    path = tmp_path / "spool" / "events.jsonl"
    whole = path.read_bytes().count(b"\n")
    assert whole >= 200
    torn = msgspec.json.encode(Event("metrics", 0, step=whole + 1, values={"train/loss": 1.0}))
    with path.open("ab") as file:
        file.write(torn[: len(torn) // 2])
    server = Server()
    tracker = open_spool(server)
    tracker.metrics({"train/loss": 0.5}, whole)  # computed again: dropped
    tracker.metrics({"train/loss": 0.5}, whole + 1)  # the half-written one: sent now
    tracker.close()
    assert server.points() == [(step, float(step)) for step in range(1, whole + 1)] + [(whole + 1, 0.5)]


def test_a_picture_is_kept_in_the_spool_until_it_is_sent(open_spool: Open, tmp_path: Path) -> None:
    server = Server()
    tracker = open_spool(server)
    tracker.picture("detections/0", Image.new("RGB", (4, 4), "red"), 7)
    tracker.close()
    with Image.open(tmp_path / "spool" / server.taken[0].tags["file"]) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


class FullDisk:
    """File on a disk with a limited number of free bytes."""

    def __init__(self, file: BinaryIO, free: int) -> None:
        self.file, self.free = file, free
        self.closed = False

    def write(self, line: bytes) -> int:
        if not self.free:
            raise OSError(28, "No space left on device")
        written = self.file.write(line[: self.free])
        self.free -= written
        return written

    def close(self) -> None:
        self.file.close()
        self.closed = True


def test_a_full_disk_delays_lines_but_raises_nothing(
    open_spool: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    tracker = open_spool(server)
    disk = FullDisk(tracker._file, free=100)
    monkeypatch.setattr(tracker, "_file", disk)
    with caplog.at_level(logging.WARNING, spool.LOG.name):
        for step in range(1, 5):
            tracker.metrics({"train/loss": float(step)}, step)
    assert len([record for record in caplog.records if "No space left" in record.message]) == 1
    disk.free = 10_000
    tracker.metrics({"train/loss": 5.0}, 5)
    tracker.close()
    assert server.points() == [(step, float(step)) for step in range(1, 6)]


def test_a_picture_that_cannot_be_written_raises_nothing(open_spool: Open, tmp_path: Path) -> None:
    server = Server()
    tracker = open_spool(server)
    (tmp_path / "spool" / "detections-0-00000007.png").mkdir()
    tracker.picture("detections/0", Image.new("RGB", (4, 4)), 7)
    tracker.close()
    assert server.taken == []


def test_a_damaged_line_is_skipped(open_spool: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_spool(Server(up=False))
    for step in (1, 2, 3):
        tracker.metrics({"train/loss": float(step)}, step)
    tracker.close()
    path = tmp_path / "spool" / "events.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\x00" * (len(lines[1]) - 1) + b"\n" + lines[2])
    server = Server()
    with caplog.at_level(logging.WARNING, spool.LOG.name):
        tracker = open_spool(server)
        tracker.metrics({"train/loss": 4.0}, 4)
        tracker.close()
    assert server.points() == [(1, 1.0), (3, 3.0), (4, 4.0)]
    assert any("a damaged line of" in record.message for record in caplog.records)
