"""The tracker reports everything in order and no step twice, and an outage of the server delays but loses nothing."""

import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from PIL import Image

from pipeline.tracking import spool, spool_folder
from pipeline.tracking.spool import SpoolTracker
from tests.support.tracking_server import Server, wait_for

Open = Callable[[Server], SpoolTracker]


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
            assert server.calls.acquire(timeout=60)
    assert [record.message for record in caplog.records if "behind" in record.message] == [
        f"tracking is behind (down); events are kept in {tracker._spool.events} and sent later"
    ]
    server.up = True
    wait_for(lambda: len(server.points()) == 20)
    tracker.metrics({"train/loss": 20.0}, 20)
    tracker.close()
    assert server.points() == [(step, float(step)) for step in range(21)]


def test_a_batch_that_fails_is_sent_again_completely(open_spool: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_folder, "_BATCH", 4)
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


def test_a_picture_is_kept_in_the_spool_until_it_is_sent(open_spool: Open, tmp_path: Path) -> None:
    server = Server()
    tracker = open_spool(server)
    tracker.picture("detections/0", Image.new("RGB", (4, 4), "red"), 7)
    tracker.close()
    with Image.open(tmp_path / "spool" / server.taken[0].tags["file"]) as image:
        assert image.getpixel((0, 0)) == (255, 0, 0)


def test_reports_of_several_threads_are_each_a_line(open_spool: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    class SlowFile:
        """File at which several threads meet."""

        def __init__(self, file: BinaryIO) -> None:
            self.file = file

        def write(self, lines: bytes) -> int:
            time.sleep(0.001)
            return self.file.write(lines)

        def close(self) -> None:
            self.file.close()

    server = Server()
    tracker = open_spool(server)
    monkeypatch.setattr(tracker, "_file", SlowFile(tracker._file))

    def warn(number: int) -> None:
        for count in range(20):
            tracker.tags({f"{number}": f"{count}"})

    threads = [threading.Thread(target=warn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    tracker.close()
    assert sorted((key, int(value)) for event in server.taken for key, value in event.tags.items()) == [
        (f"{number}", count) for number in range(4) for count in range(20)
    ]
