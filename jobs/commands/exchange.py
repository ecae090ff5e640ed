"""Subcommands that exchange models with other programs: import, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.parsing import Flag, UsageError, parse


@dataclass(frozen=True)
class Import:
    """Register a checkpoint of the original DETR, published or trained with its code, as a model version."""

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The .pth file. It is read without running any code that it contains."""
    name: str
    """Name of the registered model."""
    alias: str = "best"
    """Alias to set to the new version."""
    heads: int | None = None
    """Number of attention heads, which the file does not record. The default is the paper's 8."""
    dilation: Flag = False
    """Import the model as a DC5 model, which the file does not record."""
    categories: Path | None = None
    """JSON file with COCO's `categories`, which name the labels by their ids. Not needed for COCO itself."""


def import_file(argv: list[str]) -> None:
    """Run `detr import FILE.pth --name NAME`."""
    options = parse(Import, argv, "detr import")
    from pipeline.exchange.import_original import import_file

    imported = import_file(
        options.file,
        name=options.name,
        alias=options.alias,
        heads=options.heads,
        dilation=options.dilation,
        categories=options.categories,
    )
    for note in imported.notes:
        print(note)
    print(f"registered models:/{options.name}@{options.alias} (version {imported.registered.version})")


@dataclass(frozen=True)
class Export:
    """Write a registered version to a file that other programs read."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Registered version, models:/NAME@ALIAS or models:/NAME/VERSION."""
    original: Path | None = None
    """File for the original's format, {"model": state dict}, whose labels are category ids."""
    onnx: Path | None = None
    """File for ONNX, which is checked with onnxruntime. Needs `pip install 'detr-cluster[onnx]'`."""


def export(argv: list[str]) -> None:
    """Run `detr export MODEL --original FILE.pth --onnx FILE.onnx`."""
    options = parse(Export, argv, "detr export")
    if options.original is None and options.onnx is None:
        raise UsageError("nothing to write; expected --original FILE.pth or --onnx FILE.onnx, or both")
    if options.original is not None:
        from pipeline.exchange.export_original import export_original

        _report(options.original, export_original(options.model, options.original))
    if options.onnx is not None:
        from pipeline.exchange.export_onnx import export_onnx

        _report(options.onnx, export_onnx(options.model, options.onnx))


def _report(path: Path, notes: tuple[str, ...]) -> None:
    for note in notes:
        print(note)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
