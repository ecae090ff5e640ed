"""Progress bars for long work in this process, shown only in a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(description: str, unit: str = "image") -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total); the bar is removed at the end of the block."""
    with tqdm(desc=description, unit=unit, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance
