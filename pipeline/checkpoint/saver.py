"""Writer of checkpoints in the background.

`Saver.save` only collects references to the state. A thread copies it to the host during the next step's forward and
backward pass, which read weights but do not change them, and then writes the copy. Only the optimizer's update waits
for the copy, if it is not finished by then. At most one checkpoint is written at a time, as atomically as one that is
saved synchronously.

While the store does not answer, training continues and a newer state is saved later. Only `finish` waits for the store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pipeline.checkpoint import patience
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.catalog import Shelf
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.metadata import Meta
from pipeline.checkpoint.patience import Patience
from pipeline.checkpoint.plans import Plans
from pipeline.checkpoint.pruning import prune
from pipeline.distributed.devices import use_device
from pipeline.distributed.parallel import unwrap
from pipeline.distributed.ranks import Ranks, on_first
from pipeline.errors import CheckpointError
from shards.errors import ShardError, one_line
from shards.store.retry import StoreError

State = dict[str, Any]
_AGAIN_S = 60.0
"""Time after which a state is saved again that the store did not take."""


class Saver:
    """Writer of checkpoints in a thread, one after the other. Every rank must call the same methods in the same order.

    As a context manager it waits for the last checkpoint at the end of the block, and raises if that one failed.
    `root` is the parent of the folder `checkpoints`. The newest `keep`, the best and the milestones are kept. On rank 0
    a save is due `every_minutes` after the start of the last one (0: never), `completing` is called before a checkpoint
    becomes complete, and `saved` with the step of each complete one. `stalled_s` counts the seconds that training has
    waited for saving.

    Errors of a write are raised by the next `save` or `finish`: `CheckpointError`, or `Postponed` if the store has not
    answered for `patience.PATIENCE_S`.
    """

    def __init__(
        self,
        root: Location,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        keep: int,
        every_minutes: float = 0,
        saved: Callable[[int], None] = lambda _: None,
        completing: Callable[[], None] = lambda: None,
    ) -> None:
        self.stalled_s = 0.0
        self.root, self._keep, self._device, self._saved = root, keep, ranks.device, saved
        self._completing = completing
        self._every_s = every_minutes * 60 if ranks.first and every_minutes else math.inf
        self._last = time.monotonic()
        # Training runs collectives at the same time, and two threads must not share a process group.
        self._ranks = ranks.with_new_group()
        self._patience, self._plans = Patience(self._ranks), Plans()
        self._shelf = Shelf(root)
        self._thread = ThreadPoolExecutor(
            1, thread_name_prefix="saver", initializer=use_device, initargs=(ranks.device,)
        )
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._copy: Future[State] | None = None
        self._writing: Future[bool] | None = None
        self._meta: Meta | None = None
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._wait_for_copy())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: Meta,
        averages: checkpoint_state.Averages | None = None,
    ) -> None:
        """Start to save, after the previous write has ended; this state replaces one that the store did not take."""
        start = time.perf_counter()
        self._end_writing()
        self._copy, self._last = None, time.monotonic()
        state = checkpoint_state.state_of(model, optimizer, averages)
        # Unlike weights, the statistics of a trainable batch norm change in a forward pass.
        state["model"] |= {
            name: buffer.clone() for name, buffer in unwrap(model).named_buffers() if name in state["model"]
        }
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._copy, self._meta = self._thread.submit(self._stage, state, ready), meta
        self._writing = self._thread.submit(self._write, self._copy, meta)
        self.stalled_s += time.perf_counter() - start

    @property
    def under_way(self) -> bool:
        """True while this rank writes a checkpoint."""
        return self._writing is not None and not self._writing.done()

    def due(self) -> bool:
        """Return whether this rank needs a save now: its interval has passed, or its last save has failed.

        The next save raises the failure on every rank, which is earlier than the next regular one would. If only the store
        did not answer, a save is due a minute after the last one began.
        """
        if self.under_way:
            return False  # the store is slower than the interval: still only one checkpoint at a time
        since = time.monotonic() - self._last
        if self._writing is None:
            return since >= self._every_s
        failed = self._writing.exception() is not None
        return failed or since >= (self._every_s if self._writing.result() else min(self._every_s, _AGAIN_S))

    def finish(self) -> None:
        """Wait until the current checkpoint is complete, written again and again while the store does not answer."""
        start = time.perf_counter()
        while not self._end_writing():
            assert self._copy
            assert self._meta
            time.sleep(patience.AGAIN_S)
            self._writing = self._thread.submit(self._write, self._copy, self._meta)
        self._copy = None
        self.stalled_s += time.perf_counter() - start

    def _end_writing(self) -> bool:
        """Wait for the thread; return False if the store did not take the checkpoint."""
        writing, self._writing = self._writing, None
        return writing is None or writing.result()

    def prune(self) -> None:
        """Delete old checkpoints; only on rank 0, and only while none is written."""
        prune(self._shelf, self._keep, look=True)

    def close(self) -> None:
        """Wait for the current checkpoint and release the thread; do not raise if it failed."""
        self._hook.remove()
        self._thread.shutdown()
        self._stager.close()

    def _wait_for_copy(self) -> None:
        if self._copy and not self._copy.done():
            start = time.perf_counter()
            self._copy.exception()  # waits; if the copy failed, `_write` raises it again
            self.stalled_s += time.perf_counter() - start

    def _stage(self, state: State, ready: torch.cuda.Event | None) -> State:
        stream_context: AbstractContextManager[Any] = nullcontext()
        if ready is not None:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_event(ready)
            stream_context = torch.cuda.stream(stream)
        with stream_context, torch.inference_mode(False), torch.no_grad():
            staged = self._stager.stage(state)
        assert isinstance(staged, dict)
        return staged

    def _write(self, copy: Future[State], meta: Meta) -> bool:
        """Write a checkpoint; return False if a later attempt may succeed."""
        state = copy.result()
        try:
            checkpoint_state.write(self.root, state, meta, self._ranks, self._shelf, self._plans, self._completing)
            self._after(meta)
        except StoreError as error:
            self._patience.failed(error, "training continues and saves again")
            return False
        self._patience.answered()
        return True

    def _after(self, meta: Meta) -> None:
        """Note a complete checkpoint and delete old ones."""
        try:
            on_first(self._ranks, lambda: self._saved(meta.step))
        except (OSError, ShardError) as error:
            if isinstance(error, StoreError):
                raise
            raise CheckpointError(
                f"the checkpoint of step {meta.step} is complete, but the run's folder could not be updated "
                f"({one_line(error)}); free disk space there and make it writable, then `detr resume`"
            ) from error
        on_first(self._ranks, lambda: prune(self._shelf, self._keep))
