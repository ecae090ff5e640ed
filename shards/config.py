"""Options for making, planning and reading data sets: frozen, checked when built. Field docstrings are the flags' help.

This module imports neither numpy nor anything else that is slow to load.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import msgspec

from shards.errors import ShardError

Policy = Literal["fail", "quarantine"]


@dataclass(frozen=True)
class WriteConfig:
    """Options for writing a data set. Scripts that set `workers` need the usual `if __name__ == "__main__":`."""

    samples_per_shard: int = 1000
    """Images per tar, the unit in which a remote data set is downloaded. 1,000 images of COCO are about 160 MB."""
    workers: int = 0
    """Number of worker processes, each writing whole shards; 0 writes in the main process. The result is the same."""
    name: str | None = None
    """Name of the data set. The default is the annotation file's name without its suffix."""
    limit: int = 0
    """Write only this many images, those with the lowest ids, and say so in the data set's name. 0: all images."""
    on_defect: Policy = "fail"
    """Handling of unusable images and annotations.
    fail: write nothing but a report. quarantine: leave them out and report them."""

    def __post_init__(self) -> None:
        for field, least in (("samples_per_shard", 1), ("workers", 0), ("limit", 0)):
            _check_least(self, field, least)
        _check_policy(self.on_defect)


@dataclass(frozen=True)
class VocConfig:
    """Options for reading a Pascal VOC folder."""

    split: str | None = None
    """Name of a list in ImageSets/Main, such as trainval. The default is every image."""
    categories: Path | None = None
    """File with the category names: COCO JSON, a JSON list, or text with one name per line.
    The default is VOC's twenty if all names are among them, else the names found in Annotations, sorted."""
    keep_difficult: bool = False
    """Treat objects marked difficult as ordinary objects.
    The default makes them crowd regions, which training and scoring leave out."""
    zero_based: bool = False
    """Read coordinates as counted from 0, with xmax and ymax as edges.
    The default is VOC's convention: pixels counted from 1, both ends included."""
    workers: int = 0
    """Number of threads that read label files; 0 reads them in the main thread."""


@dataclass(frozen=True)
class YoloConfig:
    """Options for reading a folder of YOLO labels."""

    split: str | None = None
    """Subfolder to read, such as train (images/train or train/images). The default is all of images."""
    categories: Path | None = None
    """File with the class names: data.yaml, COCO JSON, a JSON list, or text with one name per line.
    The default is the folder's own data.yaml, classes.txt or obj.names."""
    workers: int = 0
    """Number of threads that read label files; 0 reads them in the main thread."""


@dataclass(frozen=True)
class IndexConfig:
    """Options for indexing WebDataset tars that were written elsewhere."""

    categories: Path | None = None
    """File with the category names: COCO JSON, a JSON list, or text with one name per line.
    The COCO JSON that the tars were made from also restores the data set's name and digest.
    The default is source.json beside the tars, else the names found in the tars, sorted."""
    name: str | None = None
    """Name of the data set. The default is that of the source JSON, if there is one, else the folder's name."""
    without_annotations: bool = False
    """Take samples without annotations as images without objects. The default reports them as defects."""
    on_defect: Policy = "fail"
    """Handling of unusable samples.
    fail: write nothing but a report. quarantine: leave them out of the index and report them."""
    workers: int = 0
    """Number of threads, each reading whole tars; 0 reads them in the main thread."""

    def __post_init__(self) -> None:
        _check_least(self, "workers", 0)
        _check_policy(self.on_defect)


def _check_least(config: WriteConfig | IndexConfig, field: str, least: int) -> None:
    value = getattr(config, field)
    if value < least:
        flag = field.replace("_", "-")
        raise ShardError(f"got --{flag} {value}, expected {least} or more")


def _check_policy(policy: str) -> None:
    if policy not in get_args(Policy):
        raise ShardError(f"got on_defect {policy!r}, expected one of {', '.join(get_args(Policy))}")


EpochTail = Literal["straddle", "short"]


@dataclass(frozen=True)
class PlanConfig:
    """Options of the order of samples and of the cut into steps: part of a run's identity, the same on every rank."""

    sort_window: int = 1
    """Number of global batches whose samples are sorted together by size. 1 sorts inside each batch, which moves no
    sample to another step; larger windows make the images of a step more alike, so that ranks wait less for each
    other."""
    shuffle_shards: int = 0
    """Number of shards that are shuffled together, for data sets larger than a node's cache: their blocks, and the
    samples in each, have a new order in every epoch. 0 shuffles the whole epoch."""
    epoch_tail: EpochTail = "straddle"
    """End of an epoch. straddle: cut the concatenation of the epochs, so that every step is full. short: end each epoch
    with a step of the remaining samples."""

    def __post_init__(self) -> None:
        if self.sort_window < 1 or self.shuffle_shards < 0:
            raise ShardError(
                f"got sort_window {self.sort_window} and shuffle_shards {self.shuffle_shards}, "
                "expected at least 1 and 0"
            )
        if self.epoch_tail not in ("straddle", "short"):
            raise ShardError(f"got epoch_tail {self.epoch_tail!r}, expected straddle or short")


class CacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Folder and size limit of the cache on each node."""

    folder: str = ""
    """Folder of the cache. "off": read every sample from the store. Empty: no cache for local data sets, and for remote
    ones the folder named by DETR_CACHE, else one below the home folder."""
    gib: float = 0.0
    """Maximum size of the cache in GiB. 0: the free disk space is the limit."""


@dataclass(frozen=True)
class ReadConfig:
    """Options of the loader."""

    threads: int = 2
    """Decoding threads. 0 reads in the calling thread, one batch at a time."""
    prefetch: int = 4
    """Maximum number of batches in memory, finished or in progress. Fewer than `threads` leaves threads idle."""
    masks: bool = False
    """Also read a mask of each object; every annotation then needs a segmentation."""
    max_bad_samples: int = 0
    """Maximum number of damaged samples to leave out of their batches, each with a warning, before reading fails."""

    def __post_init__(self) -> None:
        if self.max_bad_samples < 0:
            raise ShardError(f"got max_bad_samples {self.max_bad_samples}, expected 0 or more")
        if self.threads < 0 or self.prefetch < 1:
            raise ShardError(f"got threads {self.threads} and prefetch {self.prefetch}, expected at least 0 and 1")
