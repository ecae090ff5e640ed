"""Options for making data sets: frozen values, checked when built. Their field docstrings are the help of `detr shard`.

This module imports neither numpy nor anything else that is slow to load.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

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
