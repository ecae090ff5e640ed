"""The tiny data set of many tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TinyData:
    """Folders of a sharded training and validation set; 12 and 5 images of 64 px, classes 1 to 4."""

    root: Path
    train: str
    val: str
