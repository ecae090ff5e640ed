"""Fixture of the spool's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.tracking.spool import SpoolTracker
from tests.support.tracking_server import Server

Open = Callable[[Server], SpoolTracker]


@pytest.fixture
def open_spool(tmp_path: Path) -> Iterator[Open]:
    """Return a function that opens the tracker of one spool, which the test may close."""
    opened: list[SpoolTracker] = []

    def spool(server: Server) -> SpoolTracker:
        opened.append(SpoolTracker(tmp_path / "spool", server, interval_s=0.01))
        return opened[-1]

    yield spool
    for tracker in opened:
        if not tracker._file.closed:
            tracker.close()
