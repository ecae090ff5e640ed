"""Both splits of a built-in data set, written one after the other."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from shards.errors import ShardError
from shards.workers import Progress

Written = TypeVar("Written")


@dataclass(frozen=True)
class SplitToWrite:
    """A split of a built-in data set: its position among the splits, its name, and its images."""

    folder: Path
    number: int
    name: str
    count: int
    size: int
    first_id: int
    done: Callable[[int], None]
    """Takes the number of images of this split that have been written."""


def write_splits(
    out_dir: str | os.PathLike[str],
    train: int,
    val: int,
    size: int,
    progress: Progress | None,
    write: Callable[[SplitToWrite], Written],
) -> list[Written]:
    """Call `write` for both splits, and return its results; image ids continue from the first to the second.

    Raise `ShardError` when `size` or a number of images is too small, or the folder cannot be written.
    """
    if size < 64 or train < 1 or val < 1:
        raise ShardError(
            f"got size {size}, train {train}, val {val}, expected a size from 64 and at least 1 image each"
        )
    folder, written = Path(out_dir), list[Written]()
    try:
        for number, (name, count) in enumerate((("train", train), ("val", val))):
            before = number * train

            def done(images: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + images, train + val)

            written.append(write(SplitToWrite(folder, number, name, count, size, before + 1, done)))
    except OSError as error:
        raise ShardError(f"{folder}: cannot be written: {error}; free space or choose another folder") from error
    return written
