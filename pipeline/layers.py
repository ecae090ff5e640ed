"""What each decoder layer finds, with and without suppression of duplicates: the paper's analysis of section 4.2.

The first layer has no self-attention over what the queries found, so it predicts the same object several times, and
suppression helps it; the layers after it learn to suppress by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from detr.batch import Batch
from detr.config import ConfigError
from detr.model import DETR, Outputs
from detr.postprocess import Detection, detect
from pipeline.evaluate import Reading, evaluate_readings
from shards.manifest import Category, Manifest


@dataclass(frozen=True)
class LayerScore:
    """The twelve COCO numbers of one reading of the decoder.

    layer: 1 is the first, None all of them merged. nms: IoU above which duplicates were suppressed, None: none were.
    """

    layer: int | None
    nms: float | None
    metrics: dict[str, float]


def evaluate_layers(
    model: DETR, manifest: Manifest, categories: Sequence[Category], *, nms: float = 0.7, **options: Any
) -> list[LayerScore] | None:
    """Score every decoder layer without and with suppression, then all of them merged; on rank 0, None elsewhere.

    Each image goes through the model once. `options` are those of `pipeline.evaluate.evaluate`, whose figures are
    those of the last layer without suppression. Raises `ConfigError` for an `nms` that is no IoU.
    """
    if not 0 < nms <= 1:
        raise ConfigError(f"nms: got {nms}, expected an IoU above 0, at most 1; the paper's is 0.7")
    layers = range(1, model.config.decoder_layers + 1)
    kinds: list[tuple[int | None, float | None]] = [(layer, iou) for layer in layers for iou in (None, nms)]
    kinds.append((None, nms))
    config = model.config
    # The decoder computes every layer anyway; this only says whether the predictions of all are returned.
    model.config = replace(config, auxiliary=True)
    try:
        found = evaluate_readings(model, manifest, categories, [_reading(*kind) for kind in kinds], **options)
    finally:
        model.config = config
    if found is None:
        return None
    return [LayerScore(*kind, one.score.metrics) for kind, one in zip(kinds, found, strict=True)]


def _reading(layer: int | None, nms: float | None) -> Reading:
    def read(outputs: Outputs, batch: Batch) -> list[Detection]:
        if layer is not None:
            outputs = (*outputs.auxiliary, outputs)[layer - 1]._replace(auxiliary=(), masks=None)
        sizes = [target.original_size for target in batch.targets]
        return detect(outputs, sizes, nms=nms, merge=layer is None)

    return read
