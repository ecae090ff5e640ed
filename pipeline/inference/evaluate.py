"""Evaluation of a registered version on a data set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TypeVar

from detr.compute import arithmetic
from pipeline.data.datasets import check_fits_cache
from pipeline.display.terminal import progress_bar
from pipeline.distributed.ranks import Ranks, default_device
from pipeline.evaluation.evaluate_model import EvaluateOptions, Evaluation, evaluate_model
from pipeline.evaluation.per_layer import LayerScore, evaluate_layers
from pipeline.registry.versions import read_version
from shards.dataset.manifest import load_manifest
from shards.dataset.verify import check_sizes
from shards.read.segmentations import check_segmentations

_Scored = TypeVar("_Scored")
_PICTURES = 6  # images whose segments are drawn


def evaluate(uri: str, data: str, *, progress: bool = False) -> Evaluation:
    """Score a registered version on a data set, in the same batches as its run, and so with the same metrics."""
    return _score(evaluate_model, uri, data, progress)


def evaluate_per_layer(uri: str, data: str, *, nms: float = 0.7, progress: bool = False) -> list[LayerScore]:
    """Score every decoder layer of a registered version, in the same batches as `evaluate`."""
    return _score(partial(evaluate_layers, nms=nms), uri, data, progress)


def _score(evaluator: Callable[..., _Scored | None], uri: str, data: str, progress: bool) -> _Scored:
    manifest = load_manifest(data)
    check_sizes(manifest)
    check_fits_cache(manifest)
    model, card = read_version(uri)
    if card.model.masks and evaluator is evaluate_model:  # layers are scored by their boxes only
        check_segmentations(manifest)
    device = default_device()
    options = EvaluateOptions(card.transform, card.evaluate_batch_size, card.evaluate_batching, pictures=_PICTURES)
    with (
        arithmetic(card.tf32, deterministic=card.deterministic),  # as in the run
        progress_bar("evaluating") if progress else nullcontext() as advance,
    ):
        scored = evaluator(
            model.to(device), manifest, card.categories, options, ranks=Ranks(device=device), progress=advance
        )
    assert scored is not None  # a single process is rank 0
    return scored
