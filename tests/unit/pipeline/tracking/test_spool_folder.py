"""The files of a spool lose no event, whatever happens to the process, the disk or the power."""

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from pipeline.tracking import spool, spool_folder
from pipeline.tracking.events import Event
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.spool_folder import SpoolFolder
from tests.support.tracking_server import FullDisk, Server

Open = Callable[[Server], SpoolTracker]


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
    assert SpoolFolder(folder).empty
    assert SpoolFolder(folder).drain(Server())
    tracker = open_spool(Server(up=False))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close()
    assert not SpoolFolder(folder).empty
    server = Server()
    assert SpoolFolder(folder).drain(server)
    assert server.points() == [(1, 1.0)]
    assert SpoolFolder(folder).empty


def test_drain_keeps_events_when_the_server_is_down(open_spool: Open, tmp_path: Path) -> None:
    tracker = open_spool(Server(up=False))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close()
    folder = SpoolFolder(tmp_path / "spool")
    assert not folder.drain(Server(up=False))
    assert folder.refusal == "down"
    assert not folder.empty


def test_drain_ends_in_time_and_keeps_the_rest(
    open_spool: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_folder, "_BATCH", 1)
    tracker = open_spool(Server(up=False))
    for step in (1, 2, 3):
        tracker.metrics({"train/loss": float(step)}, step)
    tracker.close()
    server = Server()
    assert not SpoolFolder(tmp_path / "spool").drain(server, timeout_s=-1)  # over after the first batch
    assert server.points() == [(1, 1.0)]
    assert SpoolFolder(tmp_path / "spool").drain(server)
    assert server.points() == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_an_empty_cursor_after_a_power_loss_sends_everything(open_spool: Open, tmp_path: Path) -> None:
    tracker = open_spool(Server(up=False))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close()
    (tmp_path / "spool" / "cursor").write_text("")
    assert not SpoolFolder(tmp_path / "spool").empty


def test_drain_removes_a_half_line_of_a_killed_writer(open_spool: Open, tmp_path: Path) -> None:
    tracker = open_spool(Server(up=False))
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.close()
    with (tmp_path / "spool" / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "metr')
    server = Server()
    assert SpoolFolder(tmp_path / "spool").drain(server)
    assert server.points() == [(1, 1.0)]
    assert SpoolFolder(tmp_path / "spool").empty


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
