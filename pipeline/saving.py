"""Checkpoints that training does not wait for.

At a boundary the state is only looked up. A thread copies it to the host while the next step's forward and backward
pass run, which read weights and do not change them, and writes the copy afterwards; the optimizer's update alone waits
for the copy, where that is not finished by then. One checkpoint is under way at a time, and it is as whole or absent as
one that is waited for (`pipeline/checkpoint.py`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from pipeline import checkpoint
from pipeline.parallel import Ranks, unwrap

State = dict[str, Any]


@contextmanager
def open_saver(run_folder: Path, optimizer: torch.optim.Optimizer, ranks: Ranks, keep: int) -> Iterator[Saver]:
    """A saver for the run in `run_folder`, whose last checkpoint is whole when the block ends; a collective call."""
    saver = Saver(run_folder, optimizer, ranks, keep)
    try:
        yield saver
        saver.finish()
    finally:
        saver.close()


class Saver:
    """Writes one checkpoint after the other in a thread. Every rank calls the same methods in the same order.

    stalled_s: seconds that training has waited for it.
    """

    def __init__(self, run_folder: Path, optimizer: torch.optim.Optimizer, ranks: Ranks, keep: int) -> None:
        self.stalled_s = 0.0
        self._folder, self._keep, self._device = run_folder, keep, ranks.device
        # Training's collectives go on meanwhile: two threads must not share a group.
        self._ranks = ranks.apart()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        cuda = ranks.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self._copy: Future[State] | None = None
        self._writing: Future[Path] | None = None
        self._hook = optimizer.register_step_pre_hook(lambda *_: self._wait_for_copy())

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, meta: checkpoint.Meta) -> None:
        """Begin to save; the checkpoint before it is whole when this returns. Raises `CheckpointError` if it is not."""
        self.finish()
        start = time.perf_counter()
        state = checkpoint.state_of(model, optimizer)
        # The statistics of a trainable batch norm change in a forward pass.
        state["model"] |= {
            name: buffer.clone() for name, buffer in unwrap(model).named_buffers() if name in state["model"]
        }
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._copy = self._thread.submit(self._stage, state, ready)
        self._writing = self._thread.submit(self._write, self._copy, meta)
        self.stalled_s += time.perf_counter() - start

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

    def _write(self, copy: Future[State], meta: checkpoint.Meta) -> Path:
        path = checkpoint.write(self._folder, copy.result(), meta, self._ranks)
        if self._ranks.first:
            checkpoint.prune(self._folder, self._keep)
        return path
