"""Checkpoints that training does not wait for.

At a boundary the state is only looked up. A thread copies it to the host while the next step's forward and backward
pass run, which read weights and do not change them, and writes the copy afterwards; the optimizer's update alone waits
for the copy, where that is not finished by then. One checkpoint is under way at a time, and it is as whole or absent as
one that is waited for (`pipeline/checkpoint.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pipeline import checkpoint
from pipeline.checkpoint_store import Location
from pipeline.errors import CheckpointError, first_line
from pipeline.meta import Meta
from pipeline.parallel import Ranks, on_first, unwrap
from pipeline.stopping import NOTHING, Asked

State = dict[str, Any]


@contextmanager
def open_saver(
    home: Location,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
    keep: int,
    every_minutes: float = 0,
    saved: Callable[[int], None] = lambda _: None,
) -> Iterator[Saver]:
    """A saver for the run at `home`, whose last checkpoint is whole when the block ends; a collective call."""
    saver = Saver(home, optimizer, ranks, keep, every_minutes, saved)
    try:
        yield saver
        saver.finish()
    finally:
        saver.close()


class Saver:
    """Writes one checkpoint after the other in a thread. Every rank calls the same methods in the same order.

    home: see `pipeline/checkpoint.py`.
    keep: how many of the newest stay, beside the best and the milestones.
    every_minutes: rank 0 asks for a save when the last one began so long ago; 0 for never.
    saved: called by rank 0 with the step of each checkpoint that is whole.
    stalled_s: seconds that training has waited for it.
    """

    def __init__(
        self,
        home: Location,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks,
        keep: int,
        every_minutes: float = 0,
        saved: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.stalled_s = 0.0
        self.home, self._keep, self._device, self._saved = home, keep, ranks.device, saved
        self._every_s = every_minutes * 60 if ranks.first and every_minutes else math.inf
        self._last = time.monotonic()
        # Training's collectives go on meanwhile: two threads must not share a group.
        self._ranks = ranks.apart()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._copy: Future[State] | None = None
        self._writing: Future[None] | None = None
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._wait_for_copy())

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: Meta,
        averages: checkpoint.Averages | None = None,
    ) -> None:
        """Begin to save; the checkpoint before it is whole when this returns. Raises `CheckpointError` if it is not."""
        self.finish()
        start = time.perf_counter()
        self._last = time.monotonic()
        state = checkpoint.state_of(model, optimizer, averages)
        # The statistics of a trainable batch norm change in a forward pass.
        state["model"] |= {
            name: buffer.clone() for name, buffer in unwrap(model).named_buffers() if name in state["model"]
        }
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._copy = self._thread.submit(self._stage, state, ready)
        self._writing = self._thread.submit(self._write, self._copy, meta)
        self.stalled_s += time.perf_counter() - start

    @property
    def under_way(self) -> bool:
        """Whether a checkpoint is being written, on this rank."""
        return self._writing is not None and not self._writing.done()

    def asked(self) -> Asked:
        """What this rank asks for after the step at hand: a save when the clock says so.

        As well when the last one failed on it, so that all ranks hear of that now, and not at the next boundary.
        """
        if self.under_way:
            return NOTHING  # a store slower than the clock: not more than one at a time
        failed = self._writing is not None and self._writing.exception() is not None
        return Asked(save=failed or time.monotonic() - self._last >= self._every_s)

    def finish(self) -> None:
        """Wait until the checkpoint under way is whole. Raises `CheckpointError` if it cannot be written."""
        start = time.perf_counter()
        writing, self._copy, self._writing = self._writing, None, None
        if writing:
            writing.result()
        self.stalled_s += time.perf_counter() - start

    def close(self) -> None:
        """Let what is under way come to its end, whatever that is."""
        self._hook.remove()
        self._thread.shutdown()
        self._stager.close()

    def _wait_for_copy(self) -> None:
        if self._copy and not self._copy.done():
            start = time.perf_counter()
            self._copy.exception()  # which the writing raises again
            self.stalled_s += time.perf_counter() - start

    def _stage(self, state: State, ready: torch.cuda.Event | None) -> State:
        aside: AbstractContextManager[Any] = nullcontext()
        if ready is not None:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_event(ready)
            aside = torch.cuda.stream(stream)
        with aside, torch.inference_mode(False), torch.no_grad():
            staged = self._stager.stage(state)
        assert isinstance(staged, dict)
        return staged

    def _write(self, copy: Future[State], meta: Meta) -> None:
        path = checkpoint.write(self.home, copy.result(), meta, self._ranks)
        try:
            on_first(self._ranks, lambda: self._saved(meta.step))
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {path} is whole, but that could not be noted in the run's folder ({first_line(error)}); "
                "free disk space there and let it be written to, then `detr resume`"
            ) from error
        on_first(self._ranks, lambda: checkpoint.prune(self.home, self._keep))
