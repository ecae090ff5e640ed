"""Writer of checkpoints in the background.

`Saver.save` only collects references to the state. A thread copies it to the host during the next step's forward and
backward pass, which read weights but do not change them, and then writes the copy. Only the optimizer's update waits
for the copy, if it is not finished by then. At most one checkpoint is written at a time, as atomically as one that is
saved synchronously.
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

from pipeline.checkpoint import catalog
from pipeline.checkpoint import state as checkpoint_state
from pipeline.checkpoint.location import Location
from pipeline.checkpoint.metadata import Meta
from pipeline.distributed.parallel import unwrap
from pipeline.distributed.ranks import Ranks, on_first
from pipeline.errors import CheckpointError
from shards.errors import one_line

State = dict[str, Any]


class Saver:
    """Writer of checkpoints in a thread, one after the other. Every rank must call the same methods in the same order.

    As a context manager it waits for the last checkpoint at the end of the block, and raises if that one failed.
    `root` is the parent of the folder `checkpoints`. The newest `keep`, the best and the milestones are kept. On rank 0
    a save is due `every_minutes` after the start of the last one (0: never), `completing` is called before a checkpoint
    becomes complete, and `saved` with the step of each complete one. `stalled_s` counts the seconds that training has waited for saving.
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._copy: Future[State] | None = None
        self._writing: Future[None] | None = None
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
        """Start to save, after the previous checkpoint is complete; raise `CheckpointError` if that one failed."""
        self.finish()
        start = time.perf_counter()
        self._last = time.monotonic()
        state = checkpoint_state.state_of(model, optimizer, averages)
        # Unlike weights, the statistics of a trainable batch norm change in a forward pass.
        state["model"] |= {
            name: buffer.clone() for name, buffer in unwrap(model).named_buffers() if name in state["model"]
        }
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._copy = self._thread.submit(self._stage, state, ready)
        self._writing = self._thread.submit(self._write, self._copy, meta)
        self.stalled_s += time.perf_counter() - start

    @property
    def under_way(self) -> bool:
        """True while this rank writes a checkpoint."""
        return self._writing is not None and not self._writing.done()

    def due(self) -> bool:
        """Return whether this rank needs a save now: its interval has passed, or its last save has failed.

        The next save raises the failure on every rank, which is earlier than the next regular one would.
        """
        if self.under_way:
            return False  # the store is slower than the interval: still only one checkpoint at a time
        failed = self._writing is not None and self._writing.exception() is not None
        return failed or time.monotonic() - self._last >= self._every_s

    def finish(self) -> None:
        """Wait until the current checkpoint is complete; raise `CheckpointError` if it could not be written."""
        start = time.perf_counter()
        writing, self._copy, self._writing = self._writing, None, None
        if writing:
            writing.result()
        self.stalled_s += time.perf_counter() - start

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

    def _write(self, copy: Future[State], meta: Meta) -> None:
        path = checkpoint_state.write(self.root, copy.result(), meta, self._ranks, self._completing)
        try:
            on_first(self._ranks, lambda: self._saved(meta.step))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} is complete, but the run's folder could not be updated ({one_line(error)}); "
                "free disk space there and make it writable, then `detr resume`"
            ) from error
        on_first(self._ranks, lambda: catalog.prune(self.root, self._keep))
