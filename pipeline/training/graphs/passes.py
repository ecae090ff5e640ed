"""CUDA graphs of the network's forward and backward pass, one pair for each of the most frequent canvases.

A step of small batches is bound by the launches of its kernels; a graph is one launch. The matcher solves on the host, so
the losses lie between two graphs and stay as they are:

    copy the batch -> replay forward -> losses and their gradients for the predictions -> replay backward

What a graph reads and writes never moves: the batch is copied into buffers that all graphs share, weights change in place,
and the backward pass adds to `Gradients`, outside the graphs' memory. That memory is one pool, since no pass begins before
the one before has ended. Passes over other canvases run as without graphs and add to the same gradients.

Dropout is drawn anew by each replay: torch's generator belongs to the graph, which takes the seed that `train_step` sets for
(seed, step, rank, micro-batch), so a resumed run draws the same.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree

from detr.batch import Batch
from pipeline.config import RunConfig
from pipeline.data.canvases import Canvas, ChosenCanvases
from pipeline.distributed.gradients import Gradients
from pipeline.distributed.ranks import Ranks
from pipeline.training.graphs.capture import Capture
from pipeline.training.model import predict

LOG = logging.getLogger(__name__)
_KEPT = 0.1  # share of the device's memory for what has no graph, such as evaluations and a second model
_WARM_UPS = 2  # passes in which libraries choose their kernels and allocate what they keep


class Graph:
    """Forward and backward pass over one canvas, captured; `predict` and `differentiate` replay them."""

    def __init__(
        self, model: nn.Module, batch: Batch, config: RunConfig, gradients: Gradients, capture: Capture
    ) -> None:
        """Capture both passes; `batch` lies in the buffers that they read."""
        recorded: list[Tensor] = []
        self._given: list[Tensor] = []

        # Aliases, because a parameter's own end in autograd can belong to another stream, which breaks a capture.
        aliases = {
            name: value.detach().requires_grad_() for name, value in model.named_parameters() if value.requires_grad
        }

        def aliased(*inputs: Any) -> Any:
            return functional_call(model, aliases, inputs)

        def forward() -> list[Tensor]:
            leaves, self._form = _pytree.tree_flatten(predict(aliased, batch, config))
            self._present = [leaf is not None for leaf in leaves]
            recorded[:] = [leaf for leaf in leaves if leaf is not None]
            return [tensor.detach() for tensor in recorded]

        def backward() -> list[Tensor]:
            trained = [tensor for tensor in recorded if tensor.requires_grad]
            found = torch.autograd.grad(trained, [*aliases.values()], self._given, allow_unused=True)
            self._reached = gradients.add(found)
            recorded.clear()  # and with it all activations, whose memory the next graph takes
            return []

        capture.warm(forward)
        self._trained = [tensor.requires_grad for tensor in recorded]
        # Zeros, so that the passes before the first replay add nothing to the gradients.
        self._given += [torch.zeros_like(tensor) for tensor in recorded if tensor.requires_grad]
        recorded.clear()
        for _ in range(_WARM_UPS):
            capture.warm(lambda: (forward(), backward()))
        self._outputs, self._forward = capture.record(forward)
        _, self._backward = capture.record(backward)
        self._leaves: list[Tensor] = []

    def predict(self) -> Any:
        """Replay the forward pass; return copies of its predictions, which the next replay does not change."""
        self._forward()
        copies = [torch.empty_like(tensor) for tensor in self._outputs]
        torch._foreach_copy_(copies, self._outputs)
        for copy, trained in zip(copies, self._trained, strict=True):
            copy.requires_grad_(trained)
        self._leaves = [copy for copy, trained in zip(copies, self._trained, strict=True) if trained]
        remaining = iter(copies)
        return _pytree.tree_unflatten([next(remaining) if is_there else None for is_there in self._present], self._form)

    def differentiate(self, total: Tensor) -> frozenset[int]:
        """Replay the backward pass from the gradients of the total loss; return the parameters that it reaches."""
        found = torch.autograd.grad(total, self._leaves, allow_unused=True)
        given = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(self._leaves, found, strict=True)
        ]
        torch._foreach_copy_(self._given, given)
        self._leaves.clear()
        self._backward()
        return self._reached


class Graphs:
    """The graphs of a worker, captured when their canvas first comes, and the passes without one."""

    def __init__(
        self, model: nn.Module, chosen: ChosenCanvases, config: RunConfig, ranks: Ranks, capture: Capture
    ) -> None:
        self._recorder, self.gradients = capture, Gradients(model.parameters())
        self._model, self._config, self._ranks = model, config, ranks
        self._chosen, self._graphs = chosen, dict[Canvas, Graph]()
        self._left = set(chosen.canvases)
        self._bytes_per_pixel = 0.0
        pixels = max((canvas.pixels for canvas in chosen.canvases), default=0)
        self._images = torch.zeros(pixels, 3, dtype=torch.uint8, device=ranks.device)
        self._padding = torch.zeros(pixels, dtype=torch.bool, device=ranks.device)
        self._weights = [*model.parameters(), *model.buffers()]
        self._addresses = self._current_addresses()
        self._running: Graph | None = None
        self.hits = self.passes = 0

    def begin(self) -> None:
        """Begin a step: clear the gradients, and forget all graphs if weights have moved."""
        self.gradients.clear()
        if self._addresses != (now := self._current_addresses()):
            self._graphs.clear()
            self._left, self._addresses = set(self._chosen.canvases), now

    def forward(self, batch: Batch, seed: int) -> Any:
        """Return the predictions for a batch, on the host or the device, with dropout from `seed`."""
        self._running = self._graph(batch)
        self.passes += len(batch) > 0
        torch.manual_seed(seed)  # a capture has drawn numbers
        if self._running is None:
            return predict(self._model, batch.to(self._ranks.device), self._config)
        self.hits += 1
        self._fill(batch)
        return self._running.predict()

    def backward(self, total: Tensor) -> None:
        """Add the gradients of the total loss of the last forward pass."""
        if self._running is None:
            gradients = self.gradients
            gradients.reach(gradients.add(torch.autograd.grad(total, gradients.parameters, allow_unused=True)))
        else:
            self.gradients.reach(self._running.differentiate(total))
        self._running = None

    def finish(self) -> None:
        """Average the gradients of the step's passes over the ranks; a collective call."""
        self.gradients.average(self._ranks)

    def read_hit_rate(self) -> float:
        """Return the share of this rank's passes that replayed a graph, since the last call."""
        rate = self.hits / max(self.passes, 1)
        self.hits = self.passes = 0
        return rate

    def _graph(self, batch: Batch) -> Graph | None:
        canvas = Canvas(len(batch.images), *batch.images.shape[2:])
        if batch.images.dtype == torch.uint8 and canvas in self._left:
            self._left.remove(canvas)
            if self._fits(canvas):
                self._capture(canvas, batch)
        return self._graphs.get(canvas)

    def _capture(self, canvas: Canvas, batch: Batch) -> None:
        before = self._recorder.free_bytes()
        try:
            self._graphs[canvas] = Graph(self._model, self._fill(batch), self._config, self.gradients, self._recorder)
        except torch.OutOfMemoryError:
            LOG.warning("no memory for a CUDA graph of %d images of %dx%d: it and later canvases run without", *canvas)
            self._left.clear()
        if not self._bytes_per_pixel:
            self._bytes_per_pixel = max(before - self._recorder.free_bytes(), 0.0) / canvas.pixels

    def _fits(self, canvas: Canvas) -> bool:
        """Return True if memory is left for a graph and beside it for an evaluation or the largest pass without a graph.

        Neither can use the memory of graphs.
        """
        captured = max((known.pixels for known in self._graphs), default=0)
        graph, largest = max(canvas.pixels - captured, 0), self._chosen.largest_left
        kept = max(self._bytes_per_pixel * largest, _KEPT * self._recorder.total_bytes())
        return self._bytes_per_pixel * graph + kept <= self._recorder.free_bytes()

    def _fill(self, batch: Batch) -> Batch:
        """Copy a batch into the buffers that graphs read; return the batch that lies there."""
        count, _, height, width = batch.images.shape
        pixels = count * height * width
        images = self._images[:pixels].view(count, height, width, 3).permute(0, 3, 1, 2)
        padding = self._padding[:pixels].view(count, height, width)
        images.copy_(batch.images, non_blocking=True)
        if batch.padding is None:
            padding.zero_()
        else:
            padding.copy_(batch.padding, non_blocking=True)
        return Batch(images, padding, (), batch.sizes)

    def _current_addresses(self) -> Sequence[int]:
        return [tensor.data_ptr() for tensor in self._weights]
