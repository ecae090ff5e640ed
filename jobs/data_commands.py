"""detr shard coco|voc|yolo|index|verify|info."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from jobs.command_line import choose, parse


@dataclass(frozen=True, kw_only=True)
class Writing:
    """What every `detr shard FORMAT` takes."""

    out: str
    """Folder or URL (s3://... and others) to write."""
    samples_per_shard: int = 1000
    """Images in each tar, which is what is fetched at once; 1,000 of COCO are about 160 MB."""
    workers: int = 2
    """Processes, each writing whole shards; the result does not depend on them. 0 for none but this one."""
    limit: int = 0
    """Only so many images, those of lowest id; 0 for all."""
    on_defect: Literal["fail", "quarantine"] = "fail"
    """Images and annotations that cannot be used: write nothing but a report, or leave them out and report them."""
    address: str | None = None
    """Of a Ray cluster whose nodes write the shards instead (HOST:6379, ray://HOST:10001 or auto)."""


@dataclass(frozen=True, kw_only=True)
class ShardCoco(Writing):
    """Turn a COCO folder and its annotation file into WebDataset shards with a manifest."""

    images: str
    """Folder or URL of the image files."""
    annotations: Path
    """COCO instances JSON."""


@dataclass(frozen=True, kw_only=True)
class ShardVoc(Writing):
    """Turn a Pascal VOC folder into WebDataset shards with a manifest."""

    root: Path
    """Folder with JPEGImages, Annotations and ImageSets, or with images and an XML file beside each."""
    split: str | None = None
    """A list in ImageSets/Main, such as trainval; every image by default."""
    categories: Path | None = None
    """COCO JSON, JSON list or text with the names of categories; by default VOC's twenty, or those found."""
    keep_difficult: bool = False
    """Objects marked difficult are ordinary ones; by default crowd regions, which training and scoring leave out."""
    zero_based: bool = False
    """Coordinates count from 0 and xmax, ymax are edges; by default pixels from 1, both ends included, as in VOC."""


@dataclass(frozen=True, kw_only=True)
class ShardYolo(Writing):
    """Turn a folder of images and YOLO labels into WebDataset shards with a manifest."""

    root: Path
    """Folder with images and labels."""
    split: str | None = None
    """Subfolder to take, such as train (images/train or train/images); all of images by default."""
    categories: Path | None = None
    """Names of classes: data.yaml, COCO JSON, JSON list or text; by default data.yaml or classes.txt of the folder."""


def shard(argv: list[str]) -> None:
    """detr shard coco|voc|yolo|index|verify|info."""
    words: dict[str, Callable[[list[str]], None]] = {
        "coco": _shard_coco,
        "voc": _shard_voc,
        "yolo": _shard_yolo,
        "index": _shard_index,
        "verify": _shard_verify,
        "info": _shard_info,
    }
    choose(argv, words, "detr shard")


def _config(options: Writing) -> Any:
    from shards.write import WriteConfig

    return WriteConfig(
        samples_per_shard=options.samples_per_shard,
        workers=options.workers,
        limit=options.limit,
        on_defect=options.on_defect,
    )


def _write(options: Writing, write: Callable[..., Any]) -> None:
    """What every format ends in: ``write(config, progress, map)``, and what was found told."""
    from pipeline.progress import progress_bar
    from pipeline.sharding import cluster_map

    config = _config(options)

    def act() -> Any:
        with cluster_map(options.address) as spread, progress_bar("sharding") as progress:
            return write(config, progress, spread)

    _tell(act)


def _tell(act: Callable[[], Any]) -> None:
    """Make a data set, and tell what it is and what was found in its source."""
    from shards.defects import SourceError, defect_table
    from shards.existing import load_report

    try:
        manifest = act()
    except SourceError as error:
        print(defect_table(error.defects), file=sys.stderr)
        raise
    print(_describe(manifest))
    report = load_report(manifest)
    if report is not None and report.defects:
        print(defect_table(report.defects))
        images, annotations = report.images_listed - report.images, report.annotations_listed - report.annotations
        if images or annotations:
            print(
                f"WARNING: left out {images} of {report.images_listed} images and {annotations} of "
                f"{report.annotations_listed} annotations; each is in {manifest.url}/report.json",
                file=sys.stderr,
            )


def _shard_coco(argv: list[str]) -> None:
    options = parse(ShardCoco, argv, "detr shard coco")
    from shards.write import write_coco

    _write(options, functools.partial(write_coco, options.images, options.annotations, options.out))


def _shard_voc(argv: list[str]) -> None:
    options = parse(ShardVoc, argv, "detr shard voc")
    from shards.voc import VocConfig, voc_document

    config = VocConfig(
        options.split, options.categories, options.keep_difficult, options.zero_based, workers=options.workers
    )
    _shard_document(lambda progress: voc_document(options.root, config, progress), options)


def _shard_yolo(argv: list[str]) -> None:
    options = parse(ShardYolo, argv, "detr shard yolo")
    from shards.yolo import YoloConfig, yolo_document

    config = YoloConfig(options.split, options.categories, workers=options.workers)
    _shard_document(lambda progress: yolo_document(options.root, config, progress), options)


def _shard_document(convert: Callable[[Callable[[int, int], None]], Any], options: Writing) -> None:
    """Both steps of every format that becomes a COCO document first."""
    from pipeline.progress import progress_bar
    from shards.document import write_document

    _config(options)  # refused before the labels are read
    with progress_bar("reading labels", "file") as progress:
        document = convert(progress)
    _write(options, functools.partial(write_document, document, options.out))


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Make a data set of WebDataset tars where they lie: index and manifest are written beside them."""

    url: tyro.conf.Positional[str]
    """Folder or URL of the tars."""
    categories: Path | None = None
    """COCO JSON, JSON list or text with the names of categories; by default source.json beside the tars, or those found."""
    name: str | None = None
    """Name of the data set; the folder's by default."""
    without_annotations: bool = False
    """Samples without annotations are images without objects."""
    on_defect: Literal["fail", "quarantine"] = "fail"
    """Samples that cannot be used: write nothing but a report, or leave them out of the index and report them."""
    workers: int = 2
    """Threads, each reading whole tars."""


def _shard_index(argv: list[str]) -> None:
    options = parse(ShardIndex, argv, "detr shard index")
    from pipeline.progress import progress_bar
    from shards.adopt import IndexConfig, index_tars

    config = IndexConfig(
        options.categories, options.name, options.without_annotations, options.on_defect, options.workers
    )

    def act() -> Any:
        with progress_bar("indexing", "tar") as progress:
            return index_tars(options.url, config, progress)

    _tell(act)


@dataclass(frozen=True)
class DataSet:
    """A data set written by `detr shard`."""

    url: tyro.conf.Positional[str]
    """Its folder or URL."""


def _shard_info(argv: list[str]) -> None:
    from shards.manifest import load_manifest

    manifest = load_manifest(parse(DataSet, argv, "detr shard info").url)
    print(_describe(manifest))
    print("categories  " + ", ".join(f"{category.id} {category.name}" for category in manifest.categories))


def _describe(manifest: Any) -> str:
    crowds = int(manifest.index().annotations["iscrowd"].sum())
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"data set    {manifest.name} in {manifest.url}",
        f"images      {manifest.images} in {len(manifest.shards)} shards, {size / 1e6:.1f} MB",
        f"annotations {manifest.annotations} ({crowds} crowd regions), at most {manifest.index().max_boxes} boxes in an image",
        f"classes     {manifest.num_classes}",
        f"digest      {manifest.digest}",
        f"source      {manifest.source_digest} (sha256 of what it was made from)",
    ]
    return "\n".join(lines)


def _shard_verify(argv: list[str]) -> None:
    options = parse(DataSet, argv, "detr shard verify")
    from pipeline.progress import progress_bar
    from shards.errors import ShardError
    from shards.verify import verify

    with progress_bar("verifying", "shard") as progress:
        report = verify(options.url, progress)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if not report.ok:
        number = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        raise ShardError(f"{options.url}: {number}; expected the data set as it was written")
    print(f"{options.url}: {report.images} images in {report.shards} shards, every byte as written")
