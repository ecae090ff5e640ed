"""detr shard coco|verify|info."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from jobs.command_line import choose, parse


@dataclass(frozen=True)
class ShardCoco:
    """Turn a COCO folder and its annotation file into WebDataset shards with a manifest."""

    images: Path
    """Folder of the image files."""
    annotations: Path
    """COCO instances JSON."""
    out: str
    """Folder to write."""
    samples_per_shard: int = 1000
    workers: int = 2
    """Threads, each writing whole shards; the result does not depend on them."""
    limit: int = 0
    """Only so many images, those of lowest id; 0 for all."""


def shard(argv: list[str]) -> None:
    """detr shard coco|verify|info."""
    choose(argv, {"coco": _shard_coco, "verify": _shard_verify, "info": _shard_info}, "detr shard")


def _shard_coco(argv: list[str]) -> None:
    options = parse(ShardCoco, argv, "detr shard coco")
    from pipeline.progress import progress_bar
    from shards.write import WriteConfig, write_coco

    config = WriteConfig(samples_per_shard=options.samples_per_shard, workers=options.workers, limit=options.limit)
    with progress_bar("sharding") as progress:
        manifest = write_coco(options.images, options.annotations, options.out, config, progress)
    print(_describe(manifest))


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
        f"source      {manifest.source_digest} (sha256 of the annotation file)",
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
        raise ShardError(f"{options.url}: {len(report.problems)} problems; expected the data set as it was written")
    print(f"{options.url}: {report.images} images in {report.shards} shards, every byte as written")
