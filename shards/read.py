"""A plan into decoded samples: threads that read by offset, decode, transform and collate, in the plan's order.

Threads and not processes: reading, decoding and resizing release the interpreter's lock, and what holds it is 0.4 ms
per image. Nothing is torn down between shards, and each step is one task, so at most ``prefetch`` batches exist.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shards.bad_samples import bad_samples
from shards.errors import BadSampleError, ShardError
from shards.index import Ints
from shards.manifest import Manifest
from shards.plan import EpochPlan
from shards.sample import Sample, SampleReader, naming

T = TypeVar("T")
B = TypeVar("B")
_Task = tuple[Ints, Ints]  # rows and their epochs


@dataclass(frozen=True)
class ReadConfig:
    """How to read.

    Attributes:
        threads: decoding threads; 0 reads in the calling thread, one batch at a time.
        prefetch: batches under way or waiting at once: what bounds the memory. Fewer than ``threads`` idles some.
        masks: also read where objects are, pixel by pixel; every annotation then needs a segmentation.
        max_bad_samples: so many samples of a data set whose bytes are bad are left out of their batches in this process,
            each with a warning; one more is an error.
    """

    threads: int = 2
    prefetch: int = 4
    masks: bool = False
    max_bad_samples: int = 0

    def __post_init__(self) -> None:
        if self.max_bad_samples < 0:
            raise ShardError(f"got max_bad_samples {self.max_bad_samples}, expected 0 or more")
        if self.threads < 0 or self.prefetch < 1:
            raise ShardError(f"got threads {self.threads} and prefetch {self.prefetch}, expected at least 0 and 1")


def open_loader(
    manifest: Manifest,
    plan: EpochPlan,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_step: int | None = None,
    transform: Callable[[Sample], T],
    collate: Callable[[list[T]], B],
    config: ReadConfig | None = None,
) -> Generator[B, None, None]:
    """One item per step of ``plan``, in order: ``collate([transform(sample), ...])`` of this rank's part of the step.

    Args:
        manifest: the data set that ``plan`` was made for.
        plan: from ``plan_epoch``.
        rank, world_size: this rank of how many. A rank without samples in a step gets ``collate([])``.
        start_step: global step to start with; the plan's first by default. ``plan.end_step`` gives nothing.
        transform: called in the threads.
        collate: called in the threads.
        config: threads and memory.

    Closing the generator (or exhausting it) ends its threads. Raises ShardError at once for an impossible rank or
    step, and while iterating for bytes that are not the manifest's, naming the image and the shard.
    """
    if plan.images != manifest.images:
        raise ShardError(f"got a plan for {plan.images} images, expected one for this data set's {manifest.images}")
    start = plan.first_step if start_step is None else start_step
    if not plan.first_step <= start <= plan.end_step:
        raise ShardError(
            f"got start_step {start}, expected {plan.first_step}..{plan.end_step}, the steps of this epoch"
        )
    if not 0 <= rank < world_size:
        raise ShardError(f"got rank {rank} of {world_size}, expected 0 <= rank < world_size")
    tasks = (plan.step(step, rank, world_size) for step in range(start, plan.end_step))
    return _stream(manifest, tasks, transform, collate, config or ReadConfig())


def open_stream(
    manifest: Manifest,
    parts: Iterable[tuple[Ints, Ints]],
    *,
    transform: Callable[[Sample], T],
    collate: Callable[[list[T]], B],
    config: ReadConfig | None = None,
) -> Generator[B, None, None]:
    """One item per part (rows, their epochs), in order, as ``open_loader``; the parts may be of any number of plans.

    ``parts`` is asked for the next one in the calling thread, when there is room for it.
    """
    return _stream(manifest, parts, transform, collate, config or ReadConfig())


def open_batches(
    manifest: Manifest,
    batches: Iterable[Ints],
    *,
    transform: Callable[[Sample], T],
    collate: Callable[[list[T]], B],
    config: ReadConfig | None = None,
) -> Generator[B, None, None]:
    """One item per array of rows, in order, as ``open_loader``; for evaluation and pictures. The epoch is 0."""
    parts = ((rows, np.zeros(len(rows), np.int64)) for rows in batches)
    return open_stream(manifest, parts, transform=transform, collate=collate, config=config)


def read_samples(
    manifest: Manifest, rows: Sequence[int] | Ints, config: ReadConfig | None = None
) -> Generator[Sample, None, None]:
    """The samples of ``rows``, in that order."""
    batches = (np.array([row], np.int64) for row in rows)
    found = open_batches(manifest, batches, transform=_same, collate=list[Sample], config=config)
    return (sample for samples in found for sample in samples)


def _same(sample: Sample) -> Sample:
    return sample


def _stream(
    manifest: Manifest,
    tasks: Iterable[_Task],
    transform: Callable[[Sample], T],
    collate: Callable[[list[T]], B],
    config: ReadConfig,
) -> Generator[B, None, None]:
    """Batches in the order of ``tasks``, at most ``config.prefetch`` of them ahead."""
    reader = SampleReader(manifest, masks=config.masks, lenient=config.max_bad_samples > 0)
    bad = bad_samples(manifest)

    def batch(task: _Task) -> B:
        made = []
        for row, epoch in zip(*task, strict=True):
            try:
                made.append(_one(reader, row, epoch, transform))
            except BadSampleError as error:
                bad.add(int(row), error, config.max_bad_samples)
        return collate(made)

    if config.threads == 0:
        try:
            yield from map(batch, tasks)
        finally:
            reader.close()
        return
    executor = ThreadPoolExecutor(config.threads, thread_name_prefix="shards")
    waiting: deque[Future[B]] = deque()
    try:
        for task in tasks:
            waiting.append(executor.submit(batch, task))
            if len(waiting) == config.prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
        reader.close()


def _one(reader: SampleReader, row: int, epoch: int, transform: Callable[[Sample], T]) -> T:
    sample = reader.read(row, epoch)
    with naming(reader, row):
        return transform(sample)
