"""Evaluation per decoder layer, with and without non-maximum suppression: the analysis of section 4.2 of the paper.

The first layer cannot see what other queries have found, so it predicts an object several times, and suppression helps.
The later layers learn to suppress duplicates by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from detr.batch import Batch
from detr.config import ConfigError
from detr.model import DETR, Outputs
from detr.postprocess import Detection, detect
from pipeline.distributed.ranks import Ranks
from pipeline.evaluation.evaluate_model import EvaluateOptions, OutputReader, evaluate_readings
from shards.dataset.categories import Category
from shards.dataset.manifest import Manifest
from shards.workers import Progress


@dataclass(frozen=True)
class LayerScore:
    """The twelve COCO metrics of one decoder layer, or of all layers merged."""

    layer: int | None
    """Number of the layer, counted from 1; None: all of them merged."""
    nms: float | None
    """IoU above which duplicates were suppressed; None: no suppression."""
    metrics: dict[str, float]


def evaluate_layers(
    model: DETR,
    manifest: Manifest,
    categories: Sequence[Category],
    options: EvaluateOptions,
    *,
    nms: float = 0.7,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> list[LayerScore] | None:
    """Score every decoder layer without and with suppression, then all of them merged.

    A collective call: return the scores on rank 0 and None on the other ranks. Each image goes through the model once.
    The last layer without suppression has the metrics of `evaluate_model`. Raise `ConfigError` if `nms` is not an IoU
    above 0.
    """
    if not 0 < nms <= 1:
        raise ConfigError(f"nms: got {nms}, expected an IoU above 0, at most 1; the paper's is 0.7")
    layers = range(1, model.config.decoder_layers + 1)
    kinds: list[tuple[int | None, float | None]] = [(layer, iou) for layer in layers for iou in (None, nms)]
    kinds.append((None, nms))
    config = model.config
    # The decoder computes every layer anyway; this only makes the model return the predictions of all of them.
    model.config = replace(config, auxiliary=True)
    try:
        readers = [_reader(layer, iou) for layer, iou in kinds]
        evaluations = evaluate_readings(model, manifest, categories, readers, options, ranks=ranks, progress=progress)
    finally:
        model.config = config
    if evaluations is None:
        return None
    return [
        LayerScore(layer, iou, evaluation.score.metrics)
        for (layer, iou), evaluation in zip(kinds, evaluations, strict=True)
    ]


def _reader(layer: int | None, nms: float | None) -> OutputReader:
    def read(outputs: Outputs, batch: Batch) -> list[Detection]:
        if layer is not None:
            outputs = (*outputs.auxiliary, outputs)[layer - 1]._replace(auxiliary=(), masks=None)
        sizes = [target.original_size for target in batch.targets]
        return detect(outputs, sizes, nms=nms, merge=layer is None)

    return read
