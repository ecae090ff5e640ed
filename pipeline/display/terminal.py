"""Text for a terminal: layout of a table, durations, progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from tqdm import tqdm

from shards.workers import Progress


@contextmanager
def progress_bar(description: str, unit: str = "image") -> Iterator[Progress]:
    """Yield a function to call with (done, total); the bar is removed at the end of the block."""
    with tqdm(desc=description, unit=unit, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as text with left-aligned columns under a ruled header."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def time_left(end: datetime) -> str:
    """Return the time until `end` as text: `41s`, `12m40s`, `5h02m` or `3d04h`."""
    seconds = max(round((end - datetime.now(UTC)).total_seconds()), 0)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h{seconds // 60 % 60:02}m"
    return f"{seconds // 86400}d{seconds // 3600 % 24:02}h"


def clock_time(end: datetime) -> str:
    """Return `end` in local time as text, with the day or date unless it is today."""
    local, now = end.astimezone(), datetime.now().astimezone()
    if local.date() == now.date():
        return local.strftime("%H:%M:%S")
    return local.strftime("%a %H:%M" if local - now < timedelta(days=6) else "%Y-%m-%d %H:%M")
