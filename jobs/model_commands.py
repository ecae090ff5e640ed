"""Words about registered models: evaluate, predict, register."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from jobs.command_line import UsageError, parse


@dataclass(frozen=True)
class Evaluate:
    """Score a registered version on a data set: the twelve COCO numbers."""

    model: tyro.conf.Positional[str]
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    data: str
    """Folder or URL of the data set's shards."""
    json: Path | None = None
    """Also write the numbers here."""
    curves: Path | None = None
    """Also draw precision over recall here, as a PNG."""
    per_layer: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Also score every decoder layer, without and with suppression of duplicates, and all of them merged: by boxes, not masks."""
    nms_iou: float = 0.7
    """With --per-layer: of two detections of one class that overlap by more than this IoU, the better is kept."""


def evaluate(argv: list[str]) -> None:
    """detr evaluate models:/NAME@ALIAS --data URL."""
    options = parse(Evaluate, argv, "detr evaluate")
    for flag, path in (("--json", options.json), ("--curves", options.curves)):
        if path is not None:
            _check_writable(flag, path)
    if options.curves and options.per_layer:
        raise UsageError(
            "--curves with --per-layer: expected one of the two; without --per-layer the last layer is drawn"
        )
    if not 0 < options.nms_iou <= 1:
        raise UsageError(f"--nms-iou {options.nms_iou:g}: expected an IoU above 0, at most 1; the paper's is 0.7")
    if options.nms_iou != Evaluate.nms_iou and not options.per_layer:
        raise UsageError(
            f"--nms-iou {options.nms_iou:g}: expected --per-layer with it, since nothing else is suppressed"
        )
    import msgspec

    from pipeline.curves import curves_picture
    from pipeline.registered import evaluate_registered, evaluate_registered_layers
    from pipeline.report import layers_table, metrics_table

    numbers: dict[str, object]
    if options.per_layer:
        scores = evaluate_registered_layers(options.model, options.data, nms=options.nms_iou, progress=True)
        metrics = next(score.metrics for score in reversed(scores) if score.nms is None)  # the last layer's
        numbers = {**metrics, "layers": scores}
        print(metrics_table(metrics), layers_table(scores), sep="\n\n")
    else:
        score = evaluate_registered(options.model, options.data, progress=True).score
        numbers = {**score.metrics}
        print(metrics_table(score.metrics))
        if options.curves:
            curves_picture(score.curves, score.mask_curves).save(options.curves, format="PNG")
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(numbers), indent=2) + b"\n")


def _check_writable(flag: str, path: Path) -> None:
    """Refuse now what would lose the numbers after an hour."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(f"{flag} {path} cannot be written; expected a file in a folder that exists: make it first")


@dataclass(frozen=True)
class Predict:
    """Detect on pictures: annotated copies and a COCO-style detections.json."""

    model: tyro.conf.Positional[str]
    """models:/NAME@ALIAS or models:/NAME/VERSION."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """Picture files."""
    out: Path
    """Folder to write into."""
    threshold: float = 0.5
    """Leave out detections of a lower score."""


def predict(argv: list[str]) -> None:
    """detr predict models:/NAME@ALIAS IMAGE... --out DIR."""
    options = parse(Predict, argv, "detr predict")
    if not options.images:
        raise UsageError("no picture given; expected `detr predict models:/NAME@ALIAS IMAGE... --out DIR`")
    from pipeline.registered import predict as detect

    found = detect(options.model, options.images, options.out, threshold=options.threshold)
    print(
        f"{len(found)} detections in {len(options.images)} pictures: see {options.out} and {options.out / 'detections.json'}"
    )


@dataclass(frozen=True)
class Register:
    """Register the best checkpoint of a run, finished or not."""

    run: tyro.conf.Positional[str]
    """The run's id, the start of it, or its name."""
    name: str
    """Registered model."""
    alias: str = "best"
    """Alias that will point at the new version."""


def register(argv: list[str]) -> None:
    """detr register RUN --name NAME --alias ALIAS."""
    options = parse(Register, argv, "detr register")
    from pipeline.registry import register_run

    registered = register_run(options.run, name=options.name, alias=options.alias)
    print(f"registered models:/{options.name}@{options.alias} (version {registered.version})")
