"""Figures of an evaluation on their way to MLflow, with its tables and pictures."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.display.pictures import curves_picture, curves_table, evaluation_sheet
from pipeline.display.segments import gains_picture, quality_tables
from pipeline.display.tables import class_columns
from pipeline.evaluation.evaluate_model import Evaluation
from pipeline.registry.evaluations import keep_figures
from shards.dataset.manifest import load_manifest


def keep_evaluation(uri: str, data: str, evaluation: Evaluation) -> str:
    """Record an evaluation of a version in MLflow and return a link to it; raise `TrackingError` if MLflow refuses."""
    manifest, score = load_manifest(data), evaluation.score
    curves = (score.curves, score.mask_curves)
    segments = evaluation.panoptic
    return keep_figures(
        uri,
        manifest,
        score.metrics,
        evaluation.images,
        tables={
            "per_class_ap.json": class_columns(score.classes, "mask_AP" in score.metrics),
            "precision_recall.json": curves_table(*curves),
            **(quality_tables(segments.quality, manifest.categories) if segments else {}),
        },
        pictures={
            "precision_recall.png": curves_picture(*curves),
            "detections.png": evaluation_sheet(manifest, evaluation),
            **({"panoptic_errors.png": gains_picture(segments.quality)} if segments else {}),
        },
    )


def keep_last_layer(uri: str, data: str, metrics: Mapping[str, float]) -> str:
    """Record the metrics of the last layer of a version as `keep_evaluation` does, without tables and pictures."""
    manifest = load_manifest(data)
    return keep_figures(uri, manifest, metrics, manifest.images)
