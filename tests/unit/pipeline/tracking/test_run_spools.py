"""The driver sends what workers have left on any node, keeps what is refused, and takes over spools of older releases."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.checkpoint.location import Url
from pipeline.tracking import run_spools
from pipeline.tracking.events import Event
from pipeline.tracking.run_spools import EVALUATION, TRAINING, anything_left, open_tracker, send_left
from pipeline.tracking.spool import SpoolTracker
from pipeline.tracking.tags import TAG_PHASE
from shards.store import storage
from tests.support.tracking_server import Server

On = Callable[[str], None]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    """Return the server that all senders of the test reach."""
    server = Server(up=False)

    class Sender:
        def __init__(self, *_: object) -> None:
            pass

        def __call__(self, events: Sequence[Event]) -> None:
            server(events)

    monkeypatch.setattr(run_spools, "EventSender", Sender)
    return server


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> On:
    """Return a function after which everything runs on another node."""

    def go(node: str) -> None:
        monkeypatch.setenv("DETR_SCRATCH", str(tmp_path / node))

    go("node")
    return go


def left_by_workers(folder: Path | Url) -> None:
    """Report and close while the server is away."""
    for kind, name, steps in ((TRAINING, "train/loss", (1, 2)), (EVALUATION, "val/AP", (2, 1))):
        tracker = open_tracker(kind, folder, "id", "uri")
        for step in steps:
            tracker.metrics({name: float(step)}, step)
        tracker.tags({TAG_PHASE: "training", "detr.progress": "1"})
        tracker.close()


@pytest.mark.parametrize("node", ["node", "another"])
def test_the_driver_sends_what_is_left_on_any_node(server: Server, on: On, tmp_path: Path, node: str) -> None:
    run, lines = tmp_path / "run", list[str]()
    left_by_workers(run)
    on(node)
    assert anything_left(run, "id")
    server.up = True
    assert send_left(run, "id", "uri", lines.append)
    assert (server.points(), server.points("val/AP")) == ([(1, 1.0), (2, 2.0)], [(2, 2.0), (1, 1.0)])
    assert not anything_left(run, "id")
    assert not list(run.iterdir())
    assert not lines


def test_phases_that_have_passed_are_not_sent(server: Server, on: On, tmp_path: Path) -> None:
    left_by_workers(tmp_path / "run")
    server.up = True
    send_left(tmp_path / "run", "id", "uri", print)
    assert [event.tags for event in server.taken if event.kind == "tags"] == [{"detr.progress": "1"}] * 2


def test_what_is_refused_is_kept_beside_the_run(server: Server, on: On, tmp_path: Path) -> None:
    run, lines = tmp_path / "run", list[str]()
    tracker = open_tracker(TRAINING, run, "id", "uri")
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker._stop.set()  # a kill: nothing is kept
    tracker._thread.join()
    tracker._file.close()
    assert not send_left(run, "id", "uri", lines.append)
    (line,) = lines
    assert f"the last points now (down); they are kept in {run / 'unsent-training.zip'}" in line
    on("another")
    server.up = True
    assert send_left(run, "id", "uri", print)
    assert server.points() == [(1, 1.0)]


def test_a_run_that_left_nothing_is_not_touched(server: Server, on: On, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert not anything_left(run, "id")
    assert send_left(run, "id", "uri", print)
    assert not run.exists()


def test_a_store_that_is_away_is_a_warning(
    server: Server, on: On, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: str) -> bytes:
        raise OSError("the store is away")

    left_by_workers(tmp_path / "run")
    monkeypatch.setattr(storage, "read", away)
    lines: list[str] = []
    assert not send_left(tmp_path / "run", "id", "uri", lines.append)
    assert len(lines) == 2
    assert all("stays where it is until `detr sync id` sends it (the store is away)" in line for line in lines)


def test_a_store_behind_an_address_keeps_what_is_left(server: Server, on: On) -> None:
    run = Url("memory://tracking/run")
    left_by_workers(run)
    on("another")
    server.up = True
    assert send_left(run, "id", "uri", print)
    assert server.points() == [(1, 1.0), (2, 2.0)]
    assert not storage.listing(run.url)


def test_spools_of_an_older_release_are_sent_and_removed(server: Server, on: On, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for name in ("spool", "spool-evaluation"):
        old = SpoolTracker(run / name, Server())
        old.metrics({"train/loss": 1.0}, 1)
        old.close()
        old = SpoolTracker(run / name, Server(up=False))
        old.metrics({"train/loss": 2.0}, 2)
        old.close()
        (run / name / "id").unlink()  # they had none
    assert anything_left(run, "id")
    tracker = open_tracker(TRAINING, run, "id", "uri")
    tracker.metrics({"train/loss": 3.0}, 3)
    server.up = True
    tracker.close()
    assert server.points() == [(2, 2.0), (3, 3.0)]
    assert send_left(run, "id", "uri", print)
    assert server.points() == [(2, 2.0), (3, 3.0), (2, 2.0)]
    assert not list(run.iterdir())
