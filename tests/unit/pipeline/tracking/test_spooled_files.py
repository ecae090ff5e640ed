"""Artifacts in the spool: the newest of each name arrives, also after an outage and on another node."""

from pathlib import Path

from pipeline.tracking.events import Event
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.unsent import UnsentObject
from tests.support.tracking_server import Server


def contents(folder: Path, events: list[Event]) -> list[tuple[str, int, bytes | None]]:
    """Return name, step and content of the artifacts among events; None for one that a newer one replaced."""
    files = [(event, folder / event.tags["file"]) for event in events if event.kind == "file"]
    return [(event.name, event.step, path.read_bytes() if path.exists() else None) for event, path in files]


def test_only_the_newest_content_waits_for_the_server(tmp_path: Path) -> None:
    server = Server(up=False)
    tracker = SpoolTracker(tmp_path, server, interval_s=0.01)
    for step in (1, 2, 3):
        tracker.file("report.html", f"report {step}".encode(), step)
    tracker.file("images/report.html", b"another", 1)
    server.up = True
    tracker.close()
    assert contents(tmp_path, server.taken) == [
        ("report.html", 1, None),
        ("report.html", 2, None),
        ("report.html", 3, b"report 3"),
        ("images/report.html", 1, b"another"),
    ]


def test_an_older_content_is_not_reported_after_a_newer_one(tmp_path: Path) -> None:
    server = Server()
    tracker = SpoolTracker(tmp_path, server, interval_s=0.01)
    tracker.file("report.html", b"new", 2)
    tracker.file("report.html", b"old", 1)
    tracker.close()
    assert contents(tmp_path, server.taken) == [("report.html", 2, b"new")]


def test_a_content_that_was_not_sent_is_kept_for_another_node(tmp_path: Path) -> None:
    kept = UnsentObject(str(tmp_path / "store" / "unsent.zip"))
    first = SpoolTracker(tmp_path / "a", Server(up=False), kept, interval_s=0.01)
    first.file("report.html", b"<html>", 7)
    first.close()
    server = Server()
    SpoolTracker(tmp_path / "b", server, kept, interval_s=0.01).close()
    assert contents(tmp_path / "b", server.taken) == [("report.html", 7, b"<html>")]
