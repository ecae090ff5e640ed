"""Subcommand `shard` and its own: coco, coco-panoptic, voc, yolo and index make data sets, verify and info read them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from jobs.commands.stored import describe, info, verify_data_set
from jobs.parsing import Command, choose, parse
from shards.config import IndexConfig, VocConfig, WriteConfig, YoloConfig

if TYPE_CHECKING:
    from shards.workers import Progress

# Commands use workers by default. Functions do not, since a script that does needs an `if __name__ == "__main__":`.
_WRITE = WriteConfig(workers=2)
_INDEX = IndexConfig(workers=2)
_FLAGS = (tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff)


@dataclass(frozen=True)
class _VocFlags(VocConfig):
    workers: tyro.conf.Suppress[int] = 0  # one flag sets this and the writer's


@dataclass(frozen=True)
class _YoloFlags(YoloConfig):
    workers: tyro.conf.Suppress[int] = 0  # one flag sets this and the writer's


@dataclass(frozen=True, kw_only=True)
class Target:
    """Options of the subcommands that write shards."""

    out: str
    """Folder or URL (such as s3://BUCKET/NAME) of the new data set."""
    write: Annotated[WriteConfig, *_FLAGS] = _WRITE
    address: str | None = None
    """Address of a Ray cluster whose nodes write the shards: HOST:6379, ray://HOST:10001 or auto.
    The default writes them on this machine."""


@dataclass(frozen=True, kw_only=True)
class ShardCoco(Target):
    """Convert a COCO folder and its annotation file to a data set of WebDataset shards."""

    images: str
    """Folder or URL of the image files."""
    annotations: Path
    """COCO instances JSON file."""
    corrections: Path | None = None
    """JSON file of reviewed corrections of labels: delete, relabel, move or add.
    `detr evaluate --report` proposes one. Its digest and content are kept in the data set."""


@dataclass(frozen=True, kw_only=True)
class ShardCocoPanoptic(Target):
    """Convert COCO's panoptic segmentations, things and stuff, to a data set of WebDataset shards."""

    images: str
    """Folder or URL of the image files."""
    annotations: Path
    """COCO panoptic JSON file."""
    segments: str
    """Folder or URL of the PNGs of segment ids that the JSON names."""


@dataclass(frozen=True, kw_only=True)
class ShardVoc(Target):
    """Convert a Pascal VOC folder to a data set of WebDataset shards."""

    root: Path
    """Folder with JPEGImages, Annotations and ImageSets, or with images and an XML file beside each."""
    read: Annotated[_VocFlags, *_FLAGS] = _VocFlags()


@dataclass(frozen=True, kw_only=True)
class ShardYolo(Target):
    """Convert a folder of images and YOLO labels to a data set of WebDataset shards."""

    root: Path
    """Folder with images and labels."""
    read: Annotated[_YoloFlags, *_FLAGS] = _YoloFlags()


def shard(argv: list[str]) -> None:
    """Run `detr shard coco|coco-panoptic|voc|yolo|index|verify|info`."""
    choose(
        argv,
        {
            "coco": Command("Convert a COCO folder to a data set", _shard_coco),
            "coco-panoptic": Command("Convert COCO's panoptic segmentations to a data set", _shard_coco_panoptic),
            "voc": Command("Convert a Pascal VOC folder to a data set", _shard_voc),
            "yolo": Command("Convert a folder of YOLO labels to a data set", _shard_yolo),
            "index": Command("Make a data set of WebDataset tars without copying them", _shard_index),
            "verify": Command("Check every byte of a data set", verify_data_set),
            "info": Command("Describe a data set", info),
        },
        "detr shard",
    )


def _write(options: Target, write: Callable[..., Any]) -> None:
    """Call `write(config, progress, map)` on this machine or on a Ray cluster, and print the result."""
    from pipeline.cluster.ray_map import cluster_map
    from pipeline.display.terminal import progress_bar

    def make() -> Any:
        with cluster_map(options.address) as map_jobs, progress_bar("sharding") as progress:
            return write(options.write, progress, map_jobs)

    _make_and_report(make)


def _make_and_report(make: Callable[[], Any]) -> None:
    """Make a data set, then print its summary and the defects of its source; they are printed as well if it fails."""
    from shards.source.defects import SourceError
    from shards.source.report import defect_table, load_report

    try:
        manifest = make()
    except SourceError as error:
        print(defect_table(error.defects), file=sys.stderr)
        raise
    print(describe(manifest))
    report = load_report(manifest)
    if report is not None and report.defects:
        print(defect_table(report.defects))
        images, annotations = report.images_listed - report.images, report.annotations_listed - report.annotations
        if images or annotations:
            print(
                f"WARNING: left out {images} of {report.images_listed} images and {annotations} of "
                f"{report.annotations_listed} annotations; all are listed in {manifest.url}/report.json",
                file=sys.stderr,
            )


def _shard_coco(argv: list[str]) -> None:
    options = parse(ShardCoco, argv, "detr shard coco")
    from shards.write.writer import write_coco

    write = functools.partial(write_coco, options.images, options.annotations, options.out)
    _write(options, functools.partial(write, corrections=options.corrections))


def _shard_coco_panoptic(argv: list[str]) -> None:
    options = parse(ShardCocoPanoptic, argv, "detr shard coco-panoptic")
    from shards.write.writer import write_panoptic

    _write(
        options, functools.partial(write_panoptic, options.images, options.annotations, options.segments, options.out)
    )


def _shard_voc(argv: list[str]) -> None:
    options = parse(ShardVoc, argv, "detr shard voc")
    from shards.formats.voc import voc_document

    config = replace(options.read, workers=options.write.workers)
    _shard_document(lambda progress: voc_document(options.root, config, progress), options)


def _shard_yolo(argv: list[str]) -> None:
    options = parse(ShardYolo, argv, "detr shard yolo")
    from shards.formats.yolo import yolo_document

    config = replace(options.read, workers=options.write.workers)
    _shard_document(lambda progress: yolo_document(options.root, config, progress), options)


def _shard_document(convert: Callable[[Progress], Any], options: Target) -> None:
    """Convert labels of another format to a COCO document, then write it."""
    from pipeline.display.terminal import progress_bar
    from shards.formats.document import write_document

    with progress_bar("reading labels", "file") as progress:
        document = convert(progress)
    _write(options, functools.partial(write_document, document, options.out))


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Make a data set of WebDataset tars that were written elsewhere, without copying or changing them.

    Its index and manifest are written beside the tars.
    """

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or URL of the tars."""
    index: Annotated[IndexConfig, *_FLAGS] = _INDEX


def _shard_index(argv: list[str]) -> None:
    options = parse(ShardIndex, argv, "detr shard index")
    from pipeline.display.terminal import progress_bar
    from shards.foreign.index_tars import index_tars

    def make() -> Any:
        with progress_bar("indexing", "tar") as progress:
            return index_tars(options.url, options.index, progress)

    _make_and_report(make)
