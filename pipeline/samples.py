"""Where `shards` and `detr` meet: what the reader delivers becomes what the model takes.

The reader calls these in its threads. Boxes arrive as in the COCO JSON; `detr.transforms.apply` clamps them to the
image and drops those without area, as the original does. Crowds have been left out by the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice, pairwise

from torch import Tensor

from detr.batch import Batch, Target, collate
from detr.config import TransformConfig
from detr.geometry import (
    Geometry,
    crop_before_resize,
    draw_geometry,
    eval_geometry,
    evaluated_sizes,
    output_sizes,
)
from detr.transforms import apply
from pipeline.config import Batching, DataConfig, RunConfig
from pipeline.optim import Schedule
from pipeline.parallel import Ranks
from shards.index import Index, Ints
from shards.manifest import Manifest
from shards.plan import EpochPlan, PlanConfig, Sizes, plan_epoch, plan_evaluation
from shards.read import ReadConfig, open_stream
from shards.sample import Sample

Transform = Callable[[Sample], tuple[Tensor, Target]]


def training_transform(seed: int, config: TransformConfig) -> Transform:
    """Augment each sample by its (seed, epoch, image id), so by nothing that depends on the workers."""

    def transform(sample: Sample) -> tuple[Tensor, Target]:
        geometry = draw_geometry(seed, sample.epoch, sample.image_id, sample.width, sample.height, config)
        if config.pixels == "fast":
            geometry = crop_before_resize(geometry, sample.width, sample.height)
        return _apply(sample, geometry)

    return transform


def evaluation_transform(config: TransformConfig) -> Transform:
    """One resize, nothing random."""

    def transform(sample: Sample) -> tuple[Tensor, Target]:
        return _apply(sample, eval_geometry(sample.width, sample.height, config))

    return transform


def evaluation_plan(
    manifest: Manifest, config: TransformConfig, batch_size: int, batching: Batching, limit: int = 0
) -> tuple[Ints, ...]:
    """The fixed batches of an evaluation, as rows; `EvaluateConfig` says which there are, and what `limit` is."""
    sizes = None
    if batching == "same_size":
        images = manifest.index().images
        sizes = evaluated_sizes(images["width"], images["height"], config)
    return plan_evaluation(manifest, batch_size=batch_size, sizes=sizes, limit=limit)


def evaluation_collate(config: TransformConfig, batching: Batching) -> Callable[[list[tuple[Tensor, Target]]], Batch]:
    """Put an evaluation's batch on its canvas: that of its largest image, or a square that every image fits."""
    multiple = config.max_size + 1 if batching == "fixed" else 1  # the rounding can give a pixel more than `max_size`
    return partial(collate, multiple=multiple)


def plan_config(config: DataConfig) -> PlanConfig:
    """The options of a run's plan."""
    return PlanConfig(config.sort_window, config.shuffle_shards, config.epoch_tail)


def augmented_sizes(index: Index, seed: int, config: TransformConfig) -> Sizes:
    """What `plan_epoch` puts images of like shape together by: their sizes after the augmentation.

    They are known before a byte is read. A rank's slice of a step then holds images of like shape: at 4 images a rank,
    padding falls from a third of the pixels to a tenth.
    """
    images = index.images

    def sizes(rows: Ints, epochs: Ints) -> tuple[Ints, Ints]:
        chosen = images[rows]
        return output_sizes(seed, epochs, chosen["image_id"], chosen["width"], chosen["height"], config)

    return sizes


def _apply(sample: Sample, geometry: Geometry) -> tuple[Tensor, Target]:
    size = (sample.height, sample.width)
    if sample.masks is None:
        image, boxes, labels = apply(sample.image, sample.boxes_xyxy, sample.labels, geometry)
        return image, Target(boxes, labels, sample.image_id, size)
    image, boxes, labels, masks = apply(sample.image, sample.boxes_xyxy, sample.labels, geometry, sample.masks)
    return image, Target(boxes, labels, sample.image_id, size, masks)


def training_batches(
    manifest: Manifest, config: RunConfig, schedule: Schedule, ranks: Ranks, step: int, until: int
) -> Generator[tuple[Batch, ...], None, None]:
    """This rank's micro-batches of steps `step` to `until` - 1 as one stream; pinned where they go to a GPU.

    Its threads live on over epochs, and over whatever the caller does between two batches; closing it ends them.
    """
    threads = config.data.reader_threads
    passes = _passes(config, ranks)
    parts = rank_parts(manifest, config, schedule, ranks, step, until)
    batches = open_stream(
        manifest,
        (micro for part in parts for micro in _cut(part, passes)),
        transform=training_transform(config.seed, config.transform),
        collate=_collate(config, ranks),
        config=ReadConfig(threads, 2 * threads, config.model.masks, config.data.max_bad_samples),
    )
    with closing(parts), closing(batches):
        while len(step_batches := tuple(islice(batches, passes))) == passes:
            yield step_batches


def _passes(config: RunConfig, ranks: Ranks) -> int:
    """Forward passes per step: as many on every rank, whatever its part, since under FSDP they are collectives."""
    largest = -(-config.optim.batch_size // ranks.world_size)
    return -(-largest // (config.compute.max_microbatch or largest))


def _cut(part: tuple[Ints, Ints], passes: int) -> list[tuple[Ints, Ints]]:
    """A rank's part of a step as consecutive micro-batches, which after sorting hold images of like shape."""
    rows, epochs = part
    bounds = [number * len(rows) // passes for number in range(passes + 1)]
    return [(rows[start:stop], epochs[start:stop]) for start, stop in pairwise(bounds)]


def rank_parts(
    manifest: Manifest, config: RunConfig, schedule: Schedule, ranks: Ranks, step: int, until: int
) -> Generator[tuple[Ints, Ints], None, None]:
    """This rank's rows, and their epochs, of each step. The next epoch is planned while this one is read."""

    def plan(epoch: int) -> EpochPlan:
        return plan_epoch(
            manifest,
            seed=config.seed,
            epoch=epoch,
            batch_size=config.optim.batch_size,
            # No end: the last step is filled up from the epoch after the last, so that a run can be made longer later
            # and goes on at the exact next sample.
            sizes=augmented_sizes(manifest.index(), config.seed, config.transform),
            config=plan_config(config.data),
            origin=schedule.origin,
        )

    # Two threads: a run that goes on close to the end of an epoch needs two plans before its first batch.
    with ThreadPoolExecutor(2, thread_name_prefix="plan") as planner:
        epoch = schedule.epoch_of(step)
        coming = [planner.submit(plan, epoch)]
        while step < until:
            epoch += 1
            if schedule.steps(epoch) < until:
                coming.append(planner.submit(plan, epoch))
            current = coming.pop(0).result()
            end = min(current.end_step, until)
            for number in range(step, end):
                yield current.step(number, ranks.rank, ranks.world_size)
            step = end


def _collate(config: RunConfig, ranks: Ranks) -> Callable[[list[tuple[Tensor, Target]]], Batch]:
    def batch(samples: list[tuple[Tensor, Target]]) -> Batch:
        padded = collate(samples, config.compute.canvas_multiple)
        return padded.pin_memory() if ranks.device.type == "cuda" else padded

    return batch
