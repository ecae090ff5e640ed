"""Evaluation: score every image of a data set exactly once, for any number of workers.

Batches are fixed by the plan, ranks take whole batches, and rank 0 scores all detections together. Padding changes a
DETR's predictions slightly, so by default a batch holds images of one size only, and the metrics are the same for every
batch size. This departs from the original, which pads the images of a batch to the largest (`evaluate.batching
padded`). In both cases batches do not depend on the workers, so `detr evaluate` on the registered version gives the
metrics of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from detr.batch import Batch, normalise
from detr.config import TransformConfig
from detr.model import Outputs
from detr.postprocess import Detection, detect
from pipeline.config import Batching, Scorer
from pipeline.data.loader import collate_for, evaluation_collate, evaluation_plan, evaluation_transform
from pipeline.distributed.ranks import Ranks
from pipeline.errors import RunConfigError, TrainingError
from pipeline.evaluation.panoptic import PanopticCounter, PanopticScore
from shards.arrays import Ints
from shards.config import ReadConfig
from shards.dataset.categories import UNNAMED, Category
from shards.dataset.manifest import Manifest
from shards.masks.rle import encode_masks
from shards.read.loader import open_batches
from shards.score.coco_eval import Score, score_detections
from shards.score.detections import Detections
from shards.workers import Progress

# Converts the predictions for a batch to one Detection per image.
OutputReader = Callable[[Outputs, Batch], list[Detection]]


def read_last_layer(outputs: Outputs, batch: Batch) -> list[Detection]:
    """Return one detection per query of the last layer, as the paper does, with masks if the model has them."""
    canvas = (batch.images.shape[2], batch.images.shape[3])
    sizes = [target.original_size for target in batch.targets]
    return detect(outputs, sizes, sizes=batch.sizes, canvas=canvas)


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of an evaluation: image size, batches, reader threads."""

    transform: TransformConfig
    batch_size: int
    """Maximum number of images per forward pass."""
    batching: Batching = "same_size"
    """Rule for images that share a batch; see `EvaluateConfig`."""
    threads: int = 2
    """Number of threads that read and decode images."""
    limit: int = 0
    """Maximum number of images, for a smoke test; 0: all."""
    scorer: Scorer = "hotcoco"
    """Library that computes the metrics; see `EvaluateConfig`."""
    pictures: int = 0
    """Number of images, of the lowest ids, whose segments are kept to be drawn, for panoptic data."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation, and the detections that were scored."""

    score: Score
    """Its metrics hold those of `panoptic` as well."""
    detections: Detections
    rows: Ints
    """Rows of the images that were scored, each once."""
    panoptic: PanopticScore | None = None
    """Quality of the segments, for a model with masks on panoptic data."""

    @property
    def images(self) -> int:
        """Number of images that were scored."""
        return len(self.rows)


def evaluate_model(
    model: nn.Module,
    manifest: Manifest,
    categories: Sequence[Category],
    options: EvaluateOptions,
    *,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Evaluation | None:
    """Score `model` on all images of `manifest`, and its masks if it predicts any; of panoptic data by their PQ.

    A collective call: return the evaluation on rank 0 and None on the other ranks. `model` returns `Outputs`; its
    labels are positions in `categories`, which are matched to the categories of the data set by id.
    """
    ranks = ranks or Ranks()

    def evaluated(reader: OutputReader) -> Evaluation | None:
        found = evaluate_readings(model, manifest, categories, (reader,), options, ranks=ranks, progress=progress)
        return found[0] if found else None

    if not manifest.panoptic:
        return evaluated(read_last_layer)
    labels = match_categories(categories, manifest)
    with PanopticCounter(manifest, labels, options.threads, options.pictures) as counter:
        evaluation, segments = evaluated(counter), counter.gather(ranks)
    if evaluation is None or segments is None:
        return evaluation
    score = replace(evaluation.score, metrics=evaluation.score.metrics | segments.metrics)
    return replace(evaluation, score=score, panoptic=segments)


def evaluate_readings(
    model: nn.Module,
    manifest: Manifest,
    categories: Sequence[Category],
    readers: Sequence[OutputReader],
    options: EvaluateOptions,
    *,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> list[Evaluation] | None:
    """Do the same as `evaluate_model` for several readers of the outputs, from one forward pass per image.

    Return one evaluation per reader.
    """
    ranks = ranks or Ranks()
    labels = match_categories(categories, manifest)
    planned = evaluation_plan(manifest, options.transform, options.batch_size, options.batching, options.limit)
    batches = planned[ranks.rank :: ranks.world_size]
    training = model.training
    model.eval()
    try:
        own = _detect(model, manifest, batches, labels, readers, options, ranks.device, progress)
    finally:
        model.train(training)
    gathered = ranks.all_gather(own)
    if not ranks.first:
        return None
    rows = np.concatenate(planned)
    _check_each_once(manifest, rows, [image_id for _, ids in gathered for image_id in ids])
    evaluations = []
    for number in range(len(readers)):
        detections = in_image_order(Detections.concatenate([by_reader[number] for by_reader, _ in gathered]))
        score = score_detections(manifest, detections, rows=rows, scorer=options.scorer)
        evaluations.append(Evaluation(score, detections, rows))
    return evaluations


def _detect(
    model: nn.Module,
    manifest: Manifest,
    batches: Sequence[Ints],
    labels: Ints,
    readers: Sequence[OutputReader],
    options: EvaluateOptions,
    device: torch.device,
    progress: Progress | None,
) -> tuple[list[Detections], list[int]]:
    """Run the model on this rank's batches; return the detections of each reader and the ids of the images."""
    collected: list[list[Detections]] = [[] for _ in readers]  # per reader, one item per batch
    seen: list[int] = []
    total = sum(map(len, batches))
    loader = open_batches(
        manifest,
        batches,
        transform=evaluation_transform(options.transform),
        collate=partial(collate_for, collate=evaluation_collate(options.transform, options.batching), device=device),
        config=ReadConfig(threads=options.threads),
    )
    for batch in loader:
        found = detect_batch(model, batch, labels, options.transform, device, readers)
        for by_batch, detections in zip(collected, found, strict=True):
            by_batch.append(detections)
        seen += [target.image_id for target in batch.targets]
        if progress:
            progress(len(seen), total)
    return [Detections.concatenate(by_batch) for by_batch in collected], seen


def match_categories(categories: Sequence[Category], manifest: Manifest) -> Ints:
    """Return the data set's label for each label of the model, matched by category id; -1 if it has none.

    Raise `RunConfigError` if an id has different names, or if no category is shared: scores would be meaningless.
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
    # A label without a category (UNNAMED) matches nothing, whatever the data set calls its id.
    known = [label if name == category.name else -1 for (label, name), category in zip(shared, categories, strict=True)]
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
    readers: Sequence[OutputReader] = (read_last_layer,),
) -> list[Detections]:
    """Run the model once on a batch and return one `Detections` per reader, in pixels of the original images.

    Detections of classes that the data set lacks are left out.
    """
    moved = batch.to(device)
    outputs = model(normalise(moved, transform), moved.padding)
    return [_columns(read(outputs, batch), batch, labels) for read in readers]


def _columns(found: Sequence[Detection], batch: Batch, labels: Ints) -> Detections:
    """Return the detections of a batch as columns, with the labels of the data set."""
    # One copy to the host for all images: each is a wait for the device. Doubles hold all of it exactly.
    rows = torch.cat(
        [torch.cat([_column(each.scores), _column(each.labels), each.boxes_xyxy.double()], 1) for each in found]
    )
    starts = np.cumsum([0, *(len(each.scores) for each in found)])
    on_host = rows.cpu().numpy()
    images = []
    for number, (target, detection) in enumerate(zip(batch.targets, found, strict=True)):
        scores, classes, *corners = on_host[starts[number] : starts[number + 1]].T
        mapped = labels[classes.astype(np.int64)]
        known = mapped >= 0
        boxes = np.stack(corners, 1)
        boxes_xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)
        images.append(
            Detections(
                np.full(int(known.sum()), target.image_id, dtype=np.int64),
                mapped[known],
                scores.astype(np.float32)[known],
                boxes_xywh[known],
                None if detection.masks is None else _encoded(detection.masks, known),
            )
        )
    return Detections.concatenate(images)


def _column(values: Tensor) -> Tensor:
    return values[:, None].double()


def _encoded(masks: Tensor, known: npt.NDArray[np.bool_]) -> npt.NDArray[np.object_]:
    """Return the run lengths of the known masks, bool [Q, H, W].

    They are encoded after each batch, because the masks of a whole data set would not fit in memory.
    """
    # Make columns contiguous on the device, which is faster than on the host.
    chosen = torch.from_numpy(np.flatnonzero(known)).to(masks.device, non_blocking=True)
    columns = masks.index_select(0, chosen).transpose(1, 2).contiguous()
    return encode_masks(columns.cpu().numpy().transpose(0, 2, 1))


def in_image_order(detections: Detections) -> Detections:
    """Sort detections by image, stably, so that no metric depends on the order in which ranks delivered."""
    return detections.take(np.argsort(detections.image_ids, kind="stable"))


def _check_each_once(manifest: Manifest, rows: Ints, image_ids: Sequence[int]) -> None:
    expected = np.sort(manifest.index().images["image_id"][rows])
    if not np.array_equal(np.sort(np.asarray(image_ids, dtype=np.int64)), expected):
        raise TrainingError(
            f"evaluation delivered {len(image_ids)} images ({len(set(image_ids))} distinct); "
            f"expected each of the {len(expected)} of {manifest.url} exactly once"
        )
