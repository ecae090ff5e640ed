"""Words about models from and for elsewhere: import, export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from jobs.command_line import UsageError, parse


@dataclass(frozen=True)
class Import:
    """Register the model of one of the original's files (published or of a training) like one trained here."""

    file: tyro.conf.Positional[Path]
    """The .pth file. It is read without running code that it might bring."""
    name: str
    """Registered model."""
    alias: str = "best"
    """Alias that will point at the new version."""
    heads: int | None = None
    """Attention heads, where the file does not say; by default the paper's 8."""
    dilation: bool = False
    """It is a DC5 model, where the file does not say."""
    categories: Path | None = None
    """JSON with COCO's `categories`, by whose ids the labels are named; not needed for COCO itself."""


def import_file(argv: list[str]) -> None:
    """detr import FILE.pth --name NAME."""
    options = parse(Import, argv, "detr import")
    from pipeline.importing import import_file

    imported = import_file(
        options.file,
        name=options.name,
        alias=options.alias,
        heads=options.heads,
        dilation=options.dilation,
        categories=options.categories,
    )
    for line in imported.said:
        print(line)
    print(f"registered models:/{options.name}@{options.alias} (version {imported.registered.version})")


@dataclass(frozen=True)
class Export:
    """Write a registered version as a file that other programs read."""

    model: tyro.conf.Positional[str]
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    original: Path | None = None
    """Write the original's format here: {"model": state dict}, labels at their category ids."""
    onnx: Path | None = None
    """Write ONNX here, checked in onnxruntime (needs `pip install 'detr-cluster[onnx]'`)."""


def export(argv: list[str]) -> None:
    """detr export models:/NAME@ALIAS --original FILE.pth --onnx FILE.onnx."""
    options = parse(Export, argv, "detr export")
    if options.original is None and options.onnx is None:
        raise UsageError("nothing to write; expected --original FILE.pth or --onnx FILE.onnx, or both")
    if options.original is not None:
        from pipeline.exporting import export_original

        _say(options.original, export_original(options.model, options.original))
    if options.onnx is not None:
        from pipeline.onnx_file import export_onnx

        _say(options.onnx, export_onnx(options.model, options.onnx))


def _say(path: Path, said: tuple[str, ...]) -> None:
    for line in said:
        print(line)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
