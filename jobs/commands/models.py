"""Subcommands for registered models: evaluate, predict, register."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from jobs.parsing import Flag, UsageError, parse

if TYPE_CHECKING:
    from pipeline.evaluation.evaluate_model import Evaluation
    from pipeline.registry.facts import VersionFacts


@dataclass(frozen=True)
class Evaluate:
    """Score a registered version on a data set with COCO's twelve metrics, and record them in MLflow."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Registered version, models:/NAME@ALIAS or models:/NAME/VERSION."""
    data: str
    """Folder or URL of a data set made by `detr shard`."""
    json: Path | None = None
    """File for the metrics, as JSON."""
    curves: Path | None = None
    """File for a picture of precision over recall, as PNG."""
    report: Path | None = None
    """Folder for report.html, which explains the score, and for proposed corrections of suspect labels.
    The page needs no other file, and is also kept as an artifact of the version's run."""
    per_layer: Flag = False
    """Also score each decoder layer with and without non-maximum suppression (NMS).
    The detections of all layers are also scored together, with NMS. Only boxes are scored this way, no masks."""
    nms_iou: float = 0.7
    """IoU threshold of NMS, above 0, at most 1; only with --per-layer.
    Of two detections of one class that overlap more, only the one with the higher score is kept."""


@dataclass(frozen=True)
class Version:
    """Show a registered version: how good it is, what it was made of, and how it is used."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Registered version, models:/NAME@ALIAS or models:/NAME/VERSION."""


@dataclass(frozen=True)
class Lineage:
    """Follow a registered version to its run, data, annotations and corrections, and to the versions that it came from."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Registered version, models:/NAME@ALIAS or models:/NAME/VERSION."""


def show_version(argv: list[str]) -> None:
    """Run `detr show MODEL`."""
    options = parse(Version, argv, "detr show")
    from pipeline.registry.lineage import version_text

    print(version_text(_facts(options.model)))


def lineage(argv: list[str]) -> None:
    """Run `detr lineage MODEL`."""
    options = parse(Lineage, argv, "detr lineage")
    from pipeline.registry.lineage import lineage_text

    print(lineage_text(_facts(options.model)))


def _facts(uri: str) -> VersionFacts:
    from pipeline.registry.facts import facts_about
    from pipeline.tracking.mlflow_client import connect, translated_errors

    client = connect()
    with translated_errors():
        return facts_about(client, uri)


def evaluate(argv: list[str]) -> None:
    """Run `detr evaluate MODEL --data URL`."""
    options = parse(Evaluate, argv, "detr evaluate")
    if options.curves and options.per_layer:
        raise UsageError(
            "--curves with --per-layer: expected only one of the two; without --per-layer the last layer is drawn"
        )
    if options.report and options.per_layer:
        raise UsageError(
            "--report with --per-layer: expected only one of the two; without --per-layer the last layer is explained"
        )
    if not 0 < options.nms_iou <= 1:
        raise UsageError(f"--nms-iou {options.nms_iou:g}: expected an IoU above 0, at most 1; the paper's is 0.7")
    if options.nms_iou != Evaluate.nms_iou and not options.per_layer:
        raise UsageError(
            f"--nms-iou {options.nms_iou:g}: expected --per-layer with it, since NMS is used for nothing else"
        )
    from pipeline.comparison.compare import keep_detections
    from pipeline.display.pictures import curves_picture
    from pipeline.display.tables import layers_table, metrics_table
    from pipeline.exchange.export_original import check_target
    from pipeline.inference.evaluate import evaluate, evaluate_per_layer
    from pipeline.inference.kept_figures import keep_evaluation as keep_figures
    from pipeline.inference.kept_figures import keep_last_layer
    from pipeline.registry.versions import pinned

    for path in (options.json, options.curves):
        if path is not None:
            check_target(path)
    if options.report:
        options.report.mkdir(parents=True, exist_ok=True)  # before minutes of work
    options = replace(options, model=pinned(options.model))  # its alias may move meanwhile
    if options.per_layer:
        scores = evaluate_per_layer(options.model, options.data, nms=options.nms_iou, progress=True)
        last = next(score for score in reversed(scores) if score.nms is None)  # the last layer, without NMS
        print(metrics_table(last.metrics), layers_table(scores), sep="\n\n")
        _write_json(options.json, {**last.metrics, "layers": scores})
        _print_link(lambda: keep_last_layer(options.model, options.data, last.metrics))
        return
    evaluation = evaluate(options.model, options.data, progress=True)
    score = evaluation.score
    print(metrics_table(score.metrics))
    _write_json(options.json, {**score.metrics})
    if warning := keep_detections(options.model, options.data, evaluation):
        print(warning, file=sys.stderr)
    _print_link(lambda: keep_figures(options.model, options.data, evaluation))
    if options.curves:
        curves_picture(score.curves, score.mask_curves).save(options.curves, format="PNG")
    if options.report:
        _report(options, evaluation)


def _write_json(path: Path | None, metrics: dict[str, object]) -> None:
    import msgspec

    if path is not None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(metrics), indent=2) + b"\n")


def _print_link(keep: Callable[[], str]) -> None:
    """Print where MLflow has the figures; they are printed already, so that any failure is only a warning."""
    from shards.errors import one_line

    try:
        print(f"in MLflow   {keep()}", file=sys.stderr)
    except Exception as error:  # the client and the store behind it may raise anything
        print(f"warning: these figures are not in MLflow ({one_line(error)})", file=sys.stderr)


def _report(options: Evaluate, evaluation: Evaluation) -> None:
    from pipeline.inference.report import write_report
    from pipeline.registry.reports import keep_report
    from shards.errors import one_line

    assert options.report is not None
    page, digest = write_report(options.model, options.data, evaluation, options.report)
    try:
        print(f"see {page}; in MLflow: {keep_report(options.model, page, digest)}")
    except Exception as error:  # as above
        print(f"see {page}")
        print(f"warning: the page is not in MLflow ({one_line(error)})", file=sys.stderr)


@dataclass(frozen=True)
class Predict:
    """Detect objects in image files; write annotated copies and a COCO-style detections.json."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """Registered version, models:/NAME@ALIAS or models:/NAME/VERSION."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    out: Path
    """Folder for the results."""
    threshold: float = 0.5
    """Lowest score of a detection that is kept, 0 to 1."""
    exif: Literal["upright", "ignore"] = "upright"
    """Turn a picture as its camera was held, by its EXIF data; `ignore` takes the pixels as stored, as COCO's boxes do."""
    attention: Flag = False
    """Also draw the attention of the last decoder layer for the best detections of each image, as NAME-attention.png."""


def predict(argv: list[str]) -> None:
    """Run `detr predict MODEL IMAGE... --out DIR`."""
    options = parse(Predict, argv, "detr predict")
    if not options.images:
        raise UsageError("no image given; expected `detr predict models:/NAME@ALIAS IMAGE... --out DIR`")
    from pipeline.inference.predict import predict as detect

    detections = detect(
        options.model,
        options.images,
        options.out,
        threshold=options.threshold,
        exif=options.exif,
        attention=options.attention,
    )
    print(f"{len(detections)} detections in {len(options.images)} images: see {options.out / 'detections.json'}")


@dataclass(frozen=True)
class Register:
    """Register the best checkpoint of a run, whether the run has finished or not."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Id of the run, the first characters of the id, or the run's name."""
    name: str
    """Name of the registered model."""
    alias: str = "best"
    """Alias to set to the new version."""


def register(argv: list[str]) -> None:
    """Run `detr register RUN --name NAME --alias ALIAS`."""
    options = parse(Register, argv, "detr register")
    from pipeline.registry.registration import register_run

    registered = register_run(options.run, name=options.name, alias=options.alias)
    print(f"registered models:/{options.name}@{options.alias} (version {registered.version})")
