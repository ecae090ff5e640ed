"""Loader: connect the reader of `shards` to the transforms and batches of `detr`.

The reader calls the transforms in its threads. Boxes arrive as in the COCO JSON; `detr.transforms.apply` clamps them to
the image and drops those without area, as the original does. The reader has left out crowds. Panoptic data differ, as in
the original: segments without area stay, and so do crowds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice, pairwise

import torch
from torch import Tensor

from detr.batch import Batch, Target, collate
from detr.config import TransformConfig
from detr.geometry import Geometry, crop_before_resize, draw_geometry, eval_geometry, evaluated_sizes, output_sizes
from detr.transforms import apply
from pipeline.config import Batching, DataConfig, RunConfig
from pipeline.distributed.devices import use_device
from pipeline.distributed.ranks import Ranks
from pipeline.schedule import Schedule
from shards.arrays import Ints
from shards.config import PlanConfig, ReadConfig
from shards.dataset.index import Index
from shards.dataset.manifest import Manifest
from shards.plan.epoch import EpochPlan, Sizes, plan_epoch, plan_evaluation
from shards.read.bad_samples import BadSamples
from shards.read.loader import open_stream
from shards.read.sample import Sample

Transform = Callable[[Sample], tuple[Tensor, Target]]


def training_transform(seed: int, config: TransformConfig) -> Transform:
    """Return the augmentation, which depends only on (seed, epoch, image id) and not on the workers."""

    def transform(sample: Sample) -> tuple[Tensor, Target]:
        geometry = draw_geometry(seed, sample.epoch, sample.image_id, sample.width, sample.height, config)
        if config.pixels == "fast":
            geometry = crop_before_resize(geometry, sample.width, sample.height)
        return _apply(sample, geometry)

    return transform


def evaluation_transform(config: TransformConfig) -> Transform:
    """Return the transform for evaluation: one resize, nothing random."""

    def transform(sample: Sample) -> tuple[Tensor, Target]:
        return _apply(sample, eval_geometry(sample.width, sample.height, config))

    return transform


def evaluation_plan(
    manifest: Manifest, config: TransformConfig, batch_size: int, batching: Batching, limit: int = 0
) -> tuple[Ints, ...]:
    """Return the fixed batches of an evaluation as rows of the index; `EvaluateConfig` explains the options."""
    sizes = None
    if batching == "same_size":
        images = manifest.index().images
        sizes = evaluated_sizes(images["width"], images["height"], config)
    return plan_evaluation(manifest, batch_size=batch_size, sizes=sizes, limit=limit)


def evaluation_collate(config: TransformConfig, batching: Batching) -> Callable[[list[tuple[Tensor, Target]]], Batch]:
    """Return the function that pads a batch to its largest image or, for `fixed`, to a square that every image fits."""
    multiple = config.max_size + 1 if batching == "fixed" else 1  # rounding can give a pixel more than `max_size`
    return partial(collate, multiple=multiple)


def plan_config(config: DataConfig) -> PlanConfig:
    """Return the options of a run's plan."""
    return PlanConfig(config.sort_window, config.shuffle_shards, config.epoch_tail)


def augmented_sizes(index: Index, seed: int, config: TransformConfig) -> Sizes:
    """Return a function for `plan_epoch` that gives the sizes of images after augmentation, without reading them.

    The plan groups images of similar shape by them. With 4 images per rank, padding falls from a third of the pixels to
    a tenth.
    """
    images = index.images

    def sizes(rows: Ints, epochs: Ints) -> tuple[Ints, Ints]:
        chosen = images[rows]
        return output_sizes(seed, epochs, chosen["image_id"], chosen["width"], chosen["height"], config)

    return sizes


def _apply(sample: Sample, geometry: Geometry) -> tuple[Tensor, Target]:
    size = (sample.height, sample.width)
    if sample.masks is None:
        image, boxes, labels = apply(
            sample.image, sample.boxes_xyxy, sample.labels, geometry, flat_boxes=sample.panoptic
        )
        return image, Target(boxes, labels, sample.image_id, size)
    image, boxes, labels, masks = apply(
        sample.image, sample.boxes_xyxy, sample.labels, geometry, sample.masks, flat_boxes=sample.panoptic
    )
    return image, Target(boxes, labels, sample.image_id, size, masks)


def training_batches(
    manifest: Manifest,
    config: RunConfig,
    schedule: Schedule,
    ranks: Ranks,
    step: int,
    until: int,
    bad: BadSamples | None = None,
) -> Generator[tuple[Batch, ...], None, None]:
    """Yield this rank's micro-batches of each step from `step` to `until` - 1, pinned if they go to a GPU.

    `bad` collects the samples that are skipped because they are damaged. The reader threads run until the generator is
    closed: across epochs, and while the caller saves or evaluates.
    """
    passes = passes_per_step(config, ranks.world_size)
    slices = rank_slices(manifest, config, schedule, ranks, step, until)
    micro_batches = (micro_batch for rank_slice in slices for micro_batch in _split(rank_slice, passes))
    batches = _open(manifest, config, micro_batches, ranks.device, config.data.reader_threads, bad)
    with closing(slices), closing(batches):
        while len(step_batches := tuple(islice(batches, passes))) == passes:
            yield step_batches


def global_batch(
    manifest: Manifest, config: RunConfig, schedule: Schedule, step: int, workers: int, threads: int = 0
) -> Generator[tuple[Batch, ...], None, None]:
    """Yield the micro-batches of each of `workers` ranks in one step, the same as `training_batches` gives them.

    The default reads the images in the calling thread.
    """
    passes = passes_per_step(config, workers)
    with closing(_step_plans(manifest, config, schedule, step, step + 1)) as plans:
        _, plan = next(plans)
    slices = (plan.step(step, rank, workers) for rank in range(workers))
    micro_batches = (micro_batch for rank_slice in slices for micro_batch in _split(rank_slice, passes))
    with closing(_open(manifest, config, micro_batches, torch.device("cpu"), threads, None)) as batches:
        while len(rank_batches := tuple(islice(batches, passes))) == passes:
            yield rank_batches


def _open(
    manifest: Manifest,
    config: RunConfig,
    micro_batches: Iterable[tuple[Ints, Ints]],
    device: torch.device,
    threads: int,
    bad: BadSamples | None,
) -> Generator[Batch, None, None]:
    """Return the stream of augmented batches of these rows and their epochs."""
    return open_stream(
        manifest,
        micro_batches,
        transform=training_transform(config.seed, config.transform),
        collate=partial(collate_for, collate=partial(collate, multiple=config.compute.canvas_multiple), device=device),
        config=ReadConfig(threads, max(2 * threads, 1), config.model.masks, config.data.max_bad_samples),
        bad=bad,
    )


def passes_per_step(config: RunConfig, workers: int) -> int:
    """Return the number of forward passes per step, equal on every rank, because under FSDP they are collectives."""
    largest = math.ceil(config.optim.batch_size / workers)  # images of one rank
    return math.ceil(largest / (config.compute.max_microbatch or largest))


def _split(rank_slice: tuple[Ints, Ints], passes: int) -> list[tuple[Ints, Ints]]:
    """Split a rank's slice of a step into consecutive micro-batches, so that after sorting each has similar shapes."""
    rows, epochs = rank_slice
    return [(rows[start:stop], epochs[start:stop]) for start, stop in pass_bounds(len(rows), passes)]


def pass_bounds(images: int, passes: int) -> list[tuple[int, int]]:
    """Return start and stop of each micro-batch in a rank's slice of a step."""
    return list(pairwise(number * images // passes for number in range(passes + 1)))


def rank_slices(
    manifest: Manifest, config: RunConfig, schedule: Schedule, ranks: Ranks, step: int, until: int
) -> Generator[tuple[Ints, Ints], None, None]:
    """Yield this rank's rows and their epochs for each step; plan the next epoch while the current one is read."""
    with closing(_step_plans(manifest, config, schedule, step, until)) as plans:
        for number, current in plans:
            yield current.step(number, ranks.rank, ranks.world_size)


def epoch_plan(manifest: Manifest, config: RunConfig, schedule: Schedule, epoch: int) -> EpochPlan:
    """Return the plan of one epoch of a run."""
    return plan_epoch(
        manifest,
        seed=config.seed,
        epoch=epoch,
        batch_size=config.optim.batch_size,
        # No last epoch: the last step is filled from the epoch after it, so that a run can be extended later and
        # continues at exactly the next sample.
        sizes=augmented_sizes(manifest.index(), config.seed, config.transform),
        config=plan_config(config.data),
        origin=schedule.origin,
    )


def _step_plans(
    manifest: Manifest, config: RunConfig, schedule: Schedule, step: int, until: int
) -> Generator[tuple[int, EpochPlan], None, None]:
    """Yield each step with the plan that it is in."""

    plan = partial(epoch_plan, manifest, config, schedule)
    # Two threads: a run that is resumed near the end of an epoch needs two plans before its first batch.
    with ThreadPoolExecutor(2, thread_name_prefix="plan") as planner:
        epoch = schedule.epoch_of(step)
        plans = [planner.submit(plan, epoch)]
        while step < until:
            epoch += 1
            if schedule.steps(epoch) < until:
                plans.append(planner.submit(plan, epoch))
            current = plans.pop(0).result()
            end = min(current.end_step, until)
            for number in range(step, end):
                yield number, current
            step = end


def collate_for(
    samples: list[tuple[Tensor, Target]], collate: Callable[[list[tuple[Tensor, Target]]], Batch], device: torch.device
) -> Batch:
    """Return the samples as a batch, in page-locked memory if it goes to a GPU, from which copies do not block."""
    batch = collate(samples)
    if device.type != "cuda":
        return batch
    use_device(device)  # in a thread of the reader
    return batch.pin_memory()
