"""Subcommands of `shard` that read a data set: verify and info."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from jobs.parsing import Flag, parse


@dataclass(frozen=True)
class DataSet:
    """Location of a data set."""

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    """Folder or URL of the data set."""


@dataclass(frozen=True)
class Information(DataSet):
    """Describe a data set: its size, digests, categories, and how its objects are distributed."""

    against: str | None = None
    """Folder or URL of validation data to put beside it, the training data.
    Differences beyond chance are printed as warnings."""


def info(argv: list[str]) -> None:
    """Run `detr shard info`."""
    options = parse(Information, argv, "detr shard info")
    from pipeline.display.contents import contents_text
    from shards.dataset.categories import identities
    from shards.dataset.contents import contents, warning_lines
    from shards.dataset.manifest import load_manifest
    from shards.errors import ShardError

    manifest = load_manifest(options.url)
    print(describe(manifest))
    print("categories  " + ", ".join(f"{category.id} {category.name}" for category in manifest.categories))
    found = contents(manifest)
    if options.against is None:
        print(f"\n{contents_text(found)}")
        return
    other = load_manifest(options.against)
    if identities(other.categories, kinds=True) != identities(manifest.categories, kinds=True):
        raise ShardError(f"{options.against} has other categories than {options.url}; expected the same in both")
    of_other = contents(other)
    print(f"\n{contents_text(found, of_other)}")
    for line in warning_lines(found, of_other):
        print(f"WARNING: {line}", file=sys.stderr)


def describe(manifest: Any) -> str:
    """Return size, classes and digests of a data set, a line each."""
    crowds = int(manifest.index().annotations["iscrowd"].sum())
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"data set    {manifest.name} in {manifest.url}",
        f"images      {manifest.images} in {len(manifest.shards)} shards, {size / 1e6:.1f} MB",
        f"annotations {manifest.annotations} ({crowds} crowd regions), at most {manifest.index().max_boxes} boxes in an image",
        f"classes     {manifest.num_classes}{_things_and_stuff(manifest)}",
        f"digest      {manifest.digest}",
        f"source      {manifest.source_digest} (sha256 of what it was made from)",
    ]
    if manifest.corrections_digest:
        lines.append(f"corrections {manifest.corrections_digest} (sha256 of corrections.json)")
    return "\n".join(lines)


def _things_and_stuff(manifest: Any) -> str:
    """Return the numbers of both in a panoptic data set, or ""."""
    if not manifest.panoptic:
        return ""
    things = [bool(category.isthing) for category in manifest.categories]
    of_things = sum(things[label] for label in manifest.index().annotations["label"].tolist())
    return (
        f": {sum(things)} of things, {len(things) - sum(things)} of stuff; {of_things} segments of things, "
        f"{manifest.annotations - of_things} of stuff"
    )


@dataclass(frozen=True)
class Verification(DataSet):
    """Check that every byte of a data set is as it was written."""

    stock: Flag = False
    """Instead of hashing the files, read every sample through webdataset's own pipeline, as other training code does."""


def verify_data_set(argv: list[str]) -> None:
    """Run `detr shard verify`."""
    options = parse(Verification, argv, "detr shard verify")
    from pipeline.display.terminal import progress_bar
    from shards.dataset.verify import verify
    from shards.errors import ShardError
    from shards.read.stock import verify_stock

    with progress_bar("verifying", "shard") as progress:
        report = (verify_stock if options.stock else verify)(options.url, progress)
    for problem in report.problems:
        print(problem, file=sys.stderr)
    if not report.ok:
        number = "1 problem" if len(report.problems) == 1 else f"{len(report.problems)} problems"
        raise ShardError(f"{options.url}: {number}; expected the data set as it was written")
    result = "read through webdataset as indexed" if options.stock else "every byte as written"
    print(f"{options.url}: {report.images} images in {report.shards} shards, {result}")
