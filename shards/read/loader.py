"""Loader: reads, decodes, transforms and collates the samples of a plan in threads, and delivers them in order.

Threads are enough: reading, decoding and resizing release the interpreter's lock, and the rest takes 0.4 ms per image.
Threads and files stay open from shard to shard. Each batch is one task, so at most `prefetch` batches exist.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from shards.arrays import Ints
from shards.config import ReadConfig
from shards.dataset.manifest import Manifest
from shards.errors import BadSampleError, ShardError
from shards.plan.epoch import EpochPlan
from shards.read.bad_samples import BadSamples
from shards.read.sample import Sample, SampleReader, error_context

T = TypeVar("T")
B = TypeVar("B")
Task = tuple[Ints, Ints]  # rows and their epochs


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
    bad: BadSamples | None = None,
) -> Generator[B, None, None]:
    """Return a generator of this rank's batches, one per step of `plan`: `collate([transform(sample), ...])`.

    `manifest` is the data set that `plan`, from `plan_epoch`, was made for. `start_step` is the global step to start
    with, by default the plan's first; `plan.end_step` gives no batches. A rank without samples in a step gets
    `collate([])`. `transform` and `collate` are called in the threads. `bad` collects damaged samples.

    Closing or exhausting the generator ends its threads. Raise `ShardError` at once for an impossible rank or step.
    While iterating, raise `BadSampleError` for bytes that are not the manifest's, naming image and shard.
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
    steps = (plan.step(step, rank, world_size) for step in range(start, plan.end_step))
    return open_stream(manifest, steps, transform=transform, collate=collate, config=config, bad=bad)


def open_stream(
    manifest: Manifest,
    tasks: Iterable[Task],
    *,
    transform: Callable[[Sample], T],
    collate: Callable[[list[T]], B],
    config: ReadConfig | None = None,
    bad: BadSamples | None = None,
) -> Generator[B, None, None]:
    """Yield batches like `open_loader`, one per task (rows, their epochs); tasks may span many plans.

    The next task is taken from `tasks` in the calling thread, when fewer than `prefetch` batches exist.
    """
    config, bad = config or ReadConfig(), bad or BadSamples()
    reader = SampleReader(manifest, masks=config.masks, lenient=config.max_bad_samples > 0)

    def read_batch(task: Task) -> B:
        samples = []
        for row, epoch in zip(*task, strict=True):
            try:
                sample = reader.read(row, epoch)
                with error_context(reader, row):
                    samples.append(transform(sample))
            except BadSampleError as error:
                bad.add(int(row), error, config.max_bad_samples)
        return collate(samples)

    if config.threads == 0:
        try:
            yield from map(read_batch, tasks)
        finally:
            reader.close()
        return
    executor = ThreadPoolExecutor(config.threads, thread_name_prefix="shards")
    pending: deque[Future[B]] = deque()
    try:
        for task in tasks:
            pending.append(executor.submit(read_batch, task))
            if len(pending) == config.prefetch:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
        reader.close()


def open_batches(
    manifest: Manifest,
    batches: Iterable[Ints],
    *,
    transform: Callable[[Sample], T],
    collate: Callable[[list[T]], B],
    config: ReadConfig | None = None,
    bad: BadSamples | None = None,
) -> Generator[B, None, None]:
    """Return a generator of batches like `open_loader`, one per array of rows, with epoch 0: for evaluation."""
    tasks = ((rows, np.zeros(len(rows), np.int64)) for rows in batches)
    return open_stream(manifest, tasks, transform=transform, collate=collate, config=config, bad=bad)


def read_samples(
    manifest: Manifest,
    rows: Sequence[int] | Ints,
    config: ReadConfig | None = None,
    bad: BadSamples | None = None,
) -> Generator[Sample, None, None]:
    """Return a generator of the samples of `rows`, in that order."""
    single_rows = (np.array([row], np.int64) for row in rows)
    batches = open_batches(
        manifest, single_rows, transform=lambda sample: sample, collate=list[Sample], config=config, bad=bad
    )
    return (sample for batch in batches for sample in batch)
