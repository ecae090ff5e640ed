"""Subcommands that decide between models: compare, promote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.parsing import Flag, parse


@dataclass(frozen=True)
class Compare:
    """Compare two models on the same images: changes of AP or PQ with 95% intervals, and those of each class.

    An interval holds the change on other images of the same kind, by 1,000 draws of the images (paired bootstrap).
    PQ decides on panoptic data if segments of both sides are kept, otherwise AP of boxes; a line says so.
    A side may be several runs, with commas between them or as a pattern 'NAME-*': their means are compared.
    """

    before: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BEFORE")]
    """Registered version, models:/NAME@ALIAS or models:/NAME/VERSION, or a run, whose best checkpoint is compared."""
    after: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="AFTER")]
    """The same for the other side."""
    data: str | None = None
    """Folder or URL of a data set. Versions that were not evaluated on it are evaluated now.
    The default is the data set that both were evaluated on."""
    picture: Path | None = None
    """File for a picture of the changes, as PNG."""
    json: Path | None = None
    """File for all figures, as JSON."""


def compare(argv: list[str]) -> None:
    """Run `detr compare BEFORE AFTER`."""
    options = parse(Compare, argv, "detr compare")
    import msgspec

    from pipeline.comparison.compare import compare as compare_sides
    from pipeline.display.comparison import difference_picture, difference_tables
    from pipeline.exchange.export_original import check_target

    for path in (options.picture, options.json):
        if path is not None:
            check_target(path)  # before minutes of work
    found = compare_sides(options.before, options.after, options.data, progress=True)
    difference = found.difference
    for side, names in (("before", found.before), ("after", found.after)):
        print(f"{side.ljust(6)}  {', '.join(names)}")
    print(f"on      {found.data}, {difference.images:,} images, digest {found.digest[:12]}")
    print(f"by      {found.decided_by}\n")
    print(difference_tables(difference))
    if options.picture:
        title = f"{' + '.join(found.before)}  →  {' + '.join(found.after)}  on {found.data}"
        difference_picture(difference, title).save(options.picture, format="PNG")
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")


@dataclass(frozen=True)
class Promote:
    """Move an alias to a version, only if the 95% interval of the change in AP (PQ of segments) excludes a loss.

    It is compared with the version that has the alias, as by `detr compare`. Tags of the version say against what, on
    what, when and by whom.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Registered version to promote, models:/NAME/VERSION or models:/NAME@ALIAS."""
    alias: str
    """Alias to move, such as production."""
    data: str | None = None
    """Folder or URL of a data set. Versions that were not evaluated on it are evaluated now.
    The default is the data set that both were evaluated on."""
    force: Flag = False
    """Move the alias even if a loss is not excluded; the tags say so."""


def promote(argv: list[str]) -> None:
    """Run `detr promote MODEL --alias ALIAS`."""
    options = parse(Promote, argv, "detr promote")
    from pipeline.comparison.promote import promote as promote_version
    from pipeline.display.comparison import interval_text

    found = promote_version(options.model, options.alias, options.data, force=options.force, progress=True)
    if not found.moved:
        print(f"@{found.alias} is {found.uri} already")
        return
    print(f"@{found.alias} is {found.uri} now; before: {found.against or 'no version'}")
    if found.comparison:
        difference = found.comparison.difference
        print(f"{interval_text(difference.deciding)} on {difference.images:,} images of {found.comparison.data}")
        if found.comparison.decided_by != difference.deciding.name:
            print(f"decided by {found.comparison.decided_by}")
