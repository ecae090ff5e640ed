"""Evaluation: every image of a data set scored exactly once, whatever the number of workers.

Batches are fixed by the plan, ranks take whole batches, and rank 0 scores all detections together. Padding changes a
DETR's answer slightly, so a batch holds images of one size only: the figures are then the same for every batch size. This
departs from the original, which pads images of a batch to the largest (`evaluate.batching padded`). With either no
batch depends on who computes it, so the figures of a run and those of `detr evaluate` on the registered version are the
same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from detr.batch import Batch, normalise
from detr.config import TransformConfig
from detr.model import Outputs
from detr.postprocess import Detection, detect
from pipeline.config import Batching
from pipeline.errors import RunConfigError, TrainingError
from pipeline.parallel import Ranks
from pipeline.predict import UNNAMED
from pipeline.samples import evaluation_collate, evaluation_plan, evaluation_transform
from shards.detections import Detections
from shards.index import Ints
from shards.manifest import Category, Manifest
from shards.read import ReadConfig, open_batches
from shards.score import Score, score_detections
from shards.segmentation import encode_masks

# Called after each batch with (images done by this rank, images of this rank).
Progress = Callable[[int, int], None]

# How detections are read off the predictions for a batch: one Detection per image.
Reading = Callable[[Outputs, Batch], list[Detection]]


def read_queries(outputs: Outputs, batch: Batch) -> list[Detection]:
    """As the paper reads them: one detection per query of the last layer, with its mask where the model has them."""
    canvas = (batch.images.shape[2], batch.images.shape[3])
    sizes = [target.original_size for target in batch.targets]
    return detect(outputs, sizes, sizes=batch.sizes, canvas=canvas)


@dataclass(frozen=True)
class Evaluation:
    """The figures of one evaluation, and the detections they were made from."""

    score: Score
    detections: Detections
    images: int
    """How many images were scored, each once."""


def evaluate(
    model: nn.Module,
    manifest: Manifest,
    categories: Sequence[Category],
    *,
    transform: TransformConfig,
    batch_size: int,
    batching: Batching = "same_size",
    ranks: Ranks | None = None,
    threads: int = 2,
    limit: int = 0,
    progress: Progress | None = None,
) -> Evaluation | None:
    """Score `model` on the whole of `manifest`; a collective call whose answer is on rank 0, None elsewhere.

    Where the model predicts masks, they are scored as well.

    model: gives `Outputs`; its labels are positions in `categories`, which are matched to the data set's by id.
    batch_size: most images per forward. batching: which of them share one; see `EvaluateConfig`.
    limit: score only so many images, for a smoke test; 0 for all.
    """
    found = evaluate_readings(
        model,
        manifest,
        categories,
        (read_queries,),
        transform=transform,
        batch_size=batch_size,
        batching=batching,
        ranks=ranks,
        threads=threads,
        limit=limit,
        progress=progress,
    )
    return found[0] if found else None


def evaluate_readings(
    model: nn.Module,
    manifest: Manifest,
    categories: Sequence[Category],
    readings: Sequence[Reading],
    *,
    transform: TransformConfig,
    batch_size: int,
    batching: Batching = "same_size",
    ranks: Ranks | None = None,
    threads: int = 2,
    limit: int = 0,
    progress: Progress | None = None,
) -> list[Evaluation] | None:
    """As `evaluate`, one score per reading, all from the same single forward pass over each image."""
    ranks = ranks or Ranks()
    labels = match_categories(categories, manifest)
    planned = evaluation_plan(manifest, transform, batch_size, batching, limit)
    batches = planned[ranks.rank :: ranks.world_size]
    parts: list[list[Detections]] = [[] for _ in readings]
    seen: list[int] = []
    total = sum(map(len, batches))
    training = model.training
    model.eval()
    try:
        loader = open_batches(
            manifest,
            batches,
            transform=evaluation_transform(transform),
            collate=evaluation_collate(transform, batching),
            config=ReadConfig(threads=threads),
        )
        for batch in loader:
            found = detect_batch(model, batch, labels, transform, ranks.device, readings)
            for part, detections in zip(parts, found, strict=True):
                part.append(detections)
            seen += [target.image_id for target in batch.targets]
            if progress:
                progress(len(seen), total)
    finally:
        model.train(training)
    gathered = ranks.gather(([Detections.concatenate(part) for part in parts], seen))
    if not ranks.first:
        return None
    rows = np.concatenate(planned)
    _check_each_once(manifest, rows, [image_id for _, ids in gathered for image_id in ids])
    evaluations = []
    for of_ranks in zip(*(found for found, _ in gathered), strict=True):
        detections = in_image_order(Detections.concatenate(of_ranks))
        evaluations.append(Evaluation(score_detections(manifest, detections, rows=rows), detections, len(rows)))
    return evaluations


def match_categories(categories: Sequence[Category], manifest: Manifest) -> Ints:
    """For each of the model's labels the data set's label of the same category id, or -1 where it has none.

    Raises `RunConfigError` when an id stands for another name, or when nothing is shared: scoring would be nonsense.
    """
    own = {category.id: (label, category.name) for label, category in enumerate(manifest.categories)}
    for category in categories:
        name = own.get(category.id, (0, category.name))[1]
        if category.name not in (name, UNNAMED):
            raise RunConfigError(
                f"category {category.id} is {category.name!r} to the model and {name!r} in {manifest.url}; "
                "expected the same categories: evaluate on data of the classes it was trained for, or fine-tune"
            )
    shared = [own.get(category.id, (-1, "")) for category in categories]
    # A label without a category is no class of the data set's, whatever that calls the id.
    known = [label if name == one.name else -1 for (label, name), one in zip(shared, categories, strict=True)]
    labels = np.array(known, dtype=np.int64)
    if not (labels >= 0).any():
        raise RunConfigError(
            f"the model and {manifest.url} share no category; expected data of the classes the model was trained for"
        )
    return labels


@torch.inference_mode()
def detect_batch(
    model: nn.Module,
    batch: Batch,
    labels: Ints,
    transform: TransformConfig,
    device: torch.device,
    readings: Sequence[Reading] = (read_queries,),
) -> list[Detections]:
    """Of each reading the detections of one batch in pixels of the original images, from one forward pass.

    Those of classes the data set lacks are left out.
    """
    moved = batch.to(device)
    outputs = model(normalise(moved, transform), moved.padding)
    return [_columns(reading(outputs, batch), batch, labels) for reading in readings]


def _columns(found: Sequence[Detection], batch: Batch, labels: Ints) -> Detections:
    """The detections of a batch's images as columns, with the data set's labels."""
    parts = []
    for target, detection in zip(batch.targets, found, strict=True):
        mapped = labels[detection.labels.cpu().numpy()]
        known = mapped >= 0
        boxes = detection.boxes_xyxy.double().cpu().numpy()
        boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        parts.append(
            Detections(
                np.full(int(known.sum()), target.image_id, dtype=np.int64),
                mapped[known],
                detection.scores.float().cpu().numpy()[known],
                boxes_xywh[known],
                None if detection.masks is None else _encoded(detection.masks, known),
            )
        )
    return Detections.concatenate(parts)


def _encoded(masks: Tensor, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.object_]:
    """Run lengths of the known masks, bool [Q, H, W], made at once: a thousand images' masks would not fit."""
    # Columns become contiguous where the masks are, which is faster than on the host.
    columns = masks[torch.from_numpy(known).to(masks.device)].transpose(1, 2).contiguous()
    return encode_masks(columns.cpu().numpy().transpose(0, 2, 1))


def in_image_order(detections: Detections) -> Detections:
    """Sorted by image, ties as they were, so that no figure depends on which rank delivered first."""
    return detections.take(np.argsort(detections.image_ids, kind="stable"))


def _check_each_once(manifest: Manifest, rows: Ints, image_ids: Sequence[int]) -> None:
    expected = np.sort(manifest.index().images["image_id"][rows])
    if not np.array_equal(np.sort(np.asarray(image_ids, dtype=np.int64)), expected):
        raise TrainingError(
            f"evaluation delivered {len(image_ids)} images ({len(set(image_ids))} distinct); "
            f"expected each of the {len(expected)} of {manifest.url} exactly once"
        )
