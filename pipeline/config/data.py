"""Section of the training and validation data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from detr.config import check_literals
from pipeline.config.checks import require


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data, and how they are read."""

    train: str = "shards/train"
    """Folder or URL of the training data: the one that holds `manifest.json`, written by `detr shard`."""
    val: str = "shards/val"
    """Folder or URL of the validation data: the one that holds `manifest.json`, written by `detr shard`."""
    built_in: bool = False
    """Generate the built-in data set and pre-train the small backbone on it if `train` and `val` are missing.
    For the demo only."""
    built_in_stuff: bool = False
    """Generate the built-in data set in its panoptic form, with stuff behind the shapes. For the demo only."""
    reader_threads: int = 2
    """Threads per worker that read, decode and augment images.
    Raise it if MLflow's `step_share/data_wait` is not close to 0 and cores are idle."""
    sort_window: int = 1
    """Number of global batches whose images are sorted by shape together.
    1 sorts inside each batch only, so the images of a step do not change.
    A larger window pads less and is faster, but puts similar images into one step."""
    shuffle_shards: int = 0
    """Number of shards per shuffle block. 0 shuffles the whole epoch.
    Set it if the data does not fit the disk of a node."""
    epoch_tail: Literal["straddle", "short"] = "straddle"
    """Treatment of the last, incomplete batch of an epoch.
    straddle: fill it with the first images of the next epoch.
    short: take a smaller step."""
    cache: str = ""
    """Folder on each node that keeps downloaded shards. `off` reads every sample from the store.
    Empty: for remote data the folder in DETR_CACHE, or ~/.cache/detr-cluster/shards; local data is read in place."""
    cache_gib: float = 0.0
    """Maximum size of the cache folder in GiB. 0: as much as its disk has free."""
    max_bad_samples: int = 0
    """Maximum number of corrupt training images that each worker may skip, with a warning, before the run fails.
    0: the first one ends the run."""

    def __post_init__(self) -> None:
        check_literals(self, require, "data.")
        require(self.cache_gib >= 0, "data.cache_gib", self.cache_gib, "0 (no limit) or more")
        require(self.max_bad_samples >= 0, "data.max_bad_samples", self.max_bad_samples, "0 or more")
        require(self.reader_threads >= 1, "data.reader_threads", self.reader_threads, "at least 1")
        require(self.sort_window >= 1, "data.sort_window", self.sort_window, "at least 1 global batch")
        require(self.shuffle_shards >= 0, "data.shuffle_shards", self.shuffle_shards, "0 (the whole epoch) or more")
